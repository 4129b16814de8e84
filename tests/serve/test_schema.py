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
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from diffray.serve import keys
from diffray.serve.config import Access, Limits, ServeConfig

from .ask import ask
from .live import Live, live
from .scripted import Scripted

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    ignored_auth,
)
Service = tuple[Live, dict[str, str]]


@pytest.fixture(scope="module", params=["anonymous", "with a key"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = Limits(cost=1e9, queue_cost=1e12, images=1000, images_at_once=10**6, queue_images=10**6)
    access, headers = Access(), {}
    if request.param == "with a key":
        file = tmp_path_factory.mktemp("keys") / "keys.json"
        headers["Authorization"] = f"Bearer {keys.add(file, 'alice')}"
        access = Access(keys=str(file))
    with live(
        ServeConfig(log="off", limits=limits, access=access),
        lambda config: Scripted(config, adapters=("watercolour",)),
    ) as running:
        yield running, headers


def test_every_operation_is_documented(service: Service) -> None:
    document = ask(service[0].url + "/openapi.json").json
    assert document["security"] == ([{"key": []}] if service[1] else [{"key": []}, {}])
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


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/diffray/images", {"idempotency-key", "x-timeout-seconds"}),
        ("/v1/diffray/jobs", {"idempotency-key"}),
        ("/v1/images/edits", {"idempotency-key", "x-timeout-seconds"}),
        ("/sdapi/v1/txt2img", {"idempotency-key", "x-timeout-seconds"}),
        ("/sdapi/v1/extra-single-image", {"idempotency-key"}),
        ("/sdapi/v1/png-info", set()),
        ("/v1/generation/{engine_id}/text-to-image", {"idempotency-key", "x-timeout-seconds"}),
        ("/v2beta/stable-image/generate/core", {"idempotency-key", "x-timeout-seconds"}),
    ],
)
def test_headers_are_documented_where_they_are_read(service: Service, path: str, names: set[str]) -> None:
    operation = ask(service[0].url + "/openapi.json").json["paths"][path]["post"]
    found = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "header"}
    assert found == names


@pytest.mark.slow
def test_nothing_undocumented_happens(service: Service) -> None:
    running, headers = service
    examples = 8 if headers else 40
    schema = schemathesis.openapi.from_url(running.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, headers=headers, timeout=300)

        check()
    backend: Any = running.service.backend
    assert len(backend.works) > 3 * examples, "hardly any request was valid"
