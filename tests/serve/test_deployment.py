"""Where Serve listens decides who may use the service, whatever its config says."""

from __future__ import annotations

import pytest
from ray import serve

from diffray.serve import deployment
from diffray.serve.config import InvalidConfig, Replicas, ServeConfig

from .cluster import cluster, deploy


@pytest.mark.slow
def test_a_public_serve_is_public() -> None:
    with cluster(host="0.0.0.0"):
        with pytest.raises(InvalidConfig, match=r"host 0\.0\.0\.0 can be reached by others"):
            deployment.run(ServeConfig(replicas=Replicas(cpus=0.4, ingress_cpus=0.1)))
        assert not serve.status().applications
        with pytest.raises(RuntimeError, match="ingress"):
            deploy(host="127.0.0.1", access={})
        reason = serve.status().applications["diffray"].deployments["ingress"].message
        assert "host 0.0.0.0 can be reached by others" in reason
