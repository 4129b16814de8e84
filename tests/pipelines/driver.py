"""A driver process of its own, to be killed: `python driver.py job.yaml` runs the job on the fake engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def fake_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake", Path(__file__).with_name("fake.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    import ray.cloudpickle

    from diffray.pipelines import JobConfig, run

    fake = fake_module()
    ray.cloudpickle.register_pickle_by_value(fake)
    print(run(JobConfig.from_yaml(sys.argv[1]), models=fake.FakeModels()))
