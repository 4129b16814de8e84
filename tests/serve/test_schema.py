"""The OpenAPI document against the service: no surprise in statuses, types or bodies, whatever is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from diffray.serve.config import Limits, ServeConfig

from .ask import ask
from .live import Live, live
from .scripted import Scripted

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    limits = Limits(cost=1e9, queue_cost=1e12, images=1000, images_at_once=10**6, queue_images=10**6)
    with live(
        ServeConfig(log="off", limits=limits), lambda config: Scripted(config, adapters=("watercolour",))
    ) as running:
        yield running


def test_every_operation_is_documented(service: Live) -> None:
    document = ask(service.url + "/openapi.json").json
    assert document["openapi"].startswith("3.")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation.get("description"), f"{where}: says nothing"
            assert "500" in operation["responses"], where
            if method == "post":
                assert {"413", "429", "503"} <= set(operation["responses"]), where
    text = json.dumps(document["components"]["schemas"]["ImagesBody"])
    assert "examples" in text


@pytest.mark.slow
def test_nothing_undocumented_happens(service: Live) -> None:
    schema = schemathesis.openapi.from_url(service.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=30)

        check()
    backend: Any = service.service.backend
    assert len(backend.works) > 100, "hardly any request was valid"
