"""One torch thread per process, on whose number bytes depend; no usage reports; which tests share a process.

Under `pytest -n 2` those of a file do, since they share its servers; and all that start Ray, since two of it at once
are slow on a small machine.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Tests report nothing to Ray's makers, and no thread of Ray Data asks a Prometheus beside later tests.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
torch.set_num_threads(1)
# The same examples every time, however long a busy machine takes for one.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

RAY = (
    "tests/chaos/test_kills.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_tasks.py",
    "tests/packaging/test_examples.py",
    "tests/pipelines/making/test_texts.py",
    "tests/pipelines/test_metrics.py",
    "tests/pipelines/test_object_storage.py",
    "tests/pipelines/test_processor.py",
    "tests/pipelines/test_ray.py",
    "tests/serve/test_deployment.py",
    "tests/serve/test_ray_serve.py",
)


class Together(LoadScopeScheduling):
    """Hands whole files to the processes, and all of `RAY` to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file in RAY else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    config.option.loadscopereorder = False  # in the order collected: what takes longest comes early
    return Together(config, log)
