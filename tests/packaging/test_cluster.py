"""What `cluster/` holds is valid for the code and the Ray that it names, and leaves nothing open."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffray.pipelines import JobConfig

CLUSTER = Path(__file__).parents[2] / "cluster"
CONSTRAINTS = (CLUSTER.parent / "constraints.txt").read_text()
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    return next(d for path in MANIFESTS for d in documents(path) if d["kind"] == kind)


def ray_clusters() -> list[dict[str, Any]]:
    return [of_kind("RayJob")["spec"]["rayClusterSpec"], of_kind("RayService")["spec"]["rayClusterConfig"]]


def pods() -> Iterator[dict[str, Any]]:
    for cluster in ray_clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]["spec"]


def test_the_job_in_its_config_map_is_one_that_diffray_runs() -> None:
    values = yaml.safe_load(of_kind("ConfigMap")["data"]["job.yaml"])
    config = JobConfig.checked(values)
    assert config.workers.address == "auto"
    job, mounts = of_kind("RayJob")["spec"], next(pods())["containers"][0]["volumeMounts"]
    folder = next(m["mountPath"] for m in mounts if m["name"] == "job")
    assert job["entrypoint"] == f"diffray run {folder}/job.yaml"
    assert job["backoffLimit"] > 0


def test_the_service_is_one_that_serve_and_diffray_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    from diffray.serve.config import ServeConfig

    values = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(values)
    (application,) = values["applications"]
    assert application["import_path"] == "diffray.serve:app_builder"
    config = ServeConfig.checked({"host": values["http_options"]["host"], **application["args"]})
    assert config.access.keys is not None
    assert not config.access.anonymous
    assert config.replicas is not None
    folder = str(Path(config.access.keys).parent)
    service = list(pods())[2:]
    assert all(folder in {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]} for pod in service)
    drain = service[-1]["terminationGracePeriodSeconds"]
    assert drain > config.limits.seconds, "an image that is allowed to take its time must not be cut off"


def test_ray_is_the_tested_one_and_asks_for_its_token() -> None:
    pinned = re.search(r"^ray==(\S+)", CONSTRAINTS, re.M)
    assert pinned
    for cluster in ray_clusters():
        assert cluster["rayVersion"] == pinned[1]
        assert cluster["authOptions"] == {"mode": "token"}


def test_pods_have_no_rights_they_do_not_need() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            context, resources = container["securityContext"], container["resources"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert resources["requests"] == resources["limits"]
            assert "env" not in container, "secrets come from secrets"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_nothing_is_exposed(path: Path) -> None:
    for document in documents(path):
        assert document["kind"] not in {"Ingress", "Service", "Route"}
        assert not re.search(r"LoadBalancer|NodePort", json.dumps(document))


def test_only_the_service_port_is_open_to_the_namespace() -> None:
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchExpressions"] == [{"key": "ray.io/cluster", "operator": "Exists"}]
    everybody = [rule for rule in policy["ingress"] if {"podSelector": {}} in rule["from"]]
    assert [rule["ports"] for rule in everybody] == [[{"port": 8000}]]


def test_the_file_for_ray_up_is_one_that_ray_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    validate_config(prepare_config(config))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_the_image_has_the_pinned_set_and_runs_without_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert any("-c /tmp/constraints.txt" in line and "*.whl" in line for line in lines)
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000"]
    images = {c["image"] for pod in pods() for c in pod["containers"]}
    images.add(yaml.safe_load((CLUSTER / "aws.yaml").read_text())["docker"]["image"])
    assert images == {"REGISTRY/diffray:0.1.0"}
