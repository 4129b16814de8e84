"""The Ray Serve application: an ingress on CPUs, replicas with engines, autoscaling between them."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from .app import create_app
from .config import InvalidConfig, Replicas, ServeConfig
from .replica import HandleBackend, Replica, multiplexed
from .routing import ModelRouter
from .service import Service, check_access

APPLICATION = "diffray"
HEALTH_SECONDS = 5.0
"""Between two health checks; three that fail in a row are the end of a replica."""
HEALTH_PATIENCE = 10.0
"""Seconds that a replica may take to answer one: long generations do not keep it from that."""
DRAIN_MARGIN = 30.0
"""Seconds that a replica may take to stop beyond the longest generation."""
LOOK_BACK = 11.0
"""Seconds of load that autoscaling judges at least by; Serve wants more than its reports are apart, which is 10."""
UNLIMITED = 100_000
"""Requests that an ingress may hold: what waits is bounded by admission, and polls must get through."""


@serve.ingress()
class Ingress:
    """The HTTP side, without an accelerator.

    There is one, since one process must know what all clients do at once: the bound of the queue, each client's
    images at once, its progress and interruptions, answers under an Idempotency-Key, jobs that run. (Fairness
    between clients and the queue itself are in the engines, results of jobs in the store, rates where
    `limits.storage` says.) Several services, each with its own limits, may stand behind one address instead.

    It is ready when an engine of its own version is, so that a version whose model cannot be loaded never takes
    over from the one before.
    """

    async def __init__(self, values: dict[str, Any], engines: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        if (count := serve.get_replica_context().world_size) > 1:
            raise InvalidConfig(
                f"deployment ingress: got {count} replicas, allowed is 1; engines may be many"
            )
        config = ServeConfig.checked(values)
        backend = HandleBackend(config, engines)
        self.service = Service(located(config, await _http_options()), backend)
        await backend.started()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)


def application(config: ServeConfig) -> serve.Application:
    """What `serve run` and `serve deploy` run.

    With `replicas.min` 0 the last replica goes after `downscale_seconds` without an image. The first image after that
    waits for one to start, for at most `limits.seconds` (503 with Retry-After then); what asks for a model only, for
    at most 60 s.  /readyz stays 200 meanwhile. A deployment starts one replica even so, which proves the version.

    Raises:
        InvalidConfig: anybody could use the service.
    """
    check_access(config)
    scale = config.replicas or Replicas()
    values = config.model_copy(update={"replicas": scale}).model_dump(mode="json")
    lifetime: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.limits.seconds + DRAIN_MARGIN,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_PATIENCE,
        "max_surge_percent": scale.surge_percent,
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    several = len(config.models) > 1
    replica: type[Replica] = multiplexed(config.memory.models) if several else Replica
    router: dict[str, Any] = {
        "request_router_class": ModelRouter,
        "request_router_kwargs": {"busy": scale.target, "models": config.memory.models},
    }
    engines = serve.deployment(
        name="engines",
        ray_actor_options={
            "num_cpus": scale.cpus,
            "num_gpus": _gpus(config, scale),
            "resources": scale.resources,
        },
        max_ongoing_requests=max(
            config.limits.queue_images, 2
        ),  # the queue is in the engines, where it is fair
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min,
            initial_replicas=max(scale.min, 1),
            max_replicas=scale.max,
            target_ongoing_requests=scale.target,
            upscale_delay_s=scale.upscale_seconds,
            downscale_delay_s=scale.downscale_seconds,
            look_back_period_s=max(LOOK_BACK, min(30.0, scale.upscale_seconds)),
        ),
        request_router_config=RequestRouterConfig(**router if several else {}),
        **lifetime,
    )(replica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=1,
        ray_actor_options={"num_cpus": scale.ingress_cpus},
        max_ongoing_requests=UNLIMITED,
        **lifetime,
    )(Ingress)
    return ingress.bind(values, engines.bind(values))


def run(config: ServeConfig, said: Callable[[str], None] = print, address: str | None = None) -> None:
    """Serve on Ray until SIGINT or SIGTERM; beside other applications, and at its address, where a Serve runs already.

    Raises:
        InvalidConfig: anybody could use the service.
        RuntimeError: the application did not become healthy (Ray).
    """
    app = application(config)
    with ExitStack() as stack:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
            stack.callback(ray.shutdown)
        if _http_options() is None:
            stack.callback(serve.shutdown)
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
        config = located(config, ray.get(_http_options()))  # a Serve that ran before stays where it is
        check_access(config)
        said(f"http://{config.host}:{config.port}/  loading {config.default_model} ...")
        stack.callback(serve.delete, APPLICATION)
        serve.run(app, name=APPLICATION, route_prefix="/")
        said("ready")
        _wait()


def located(config: ServeConfig, http: HTTPOptions) -> ServeConfig:
    """The config with the address at which Serve itself listens: that decides who can reach the service."""
    return config.model_copy(update={"host": http.host or "0.0.0.0", "port": http.port})


def _http_options() -> Any:
    """The future HTTP options of the Serve that runs; None where none does."""
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
    return controller.get_http_config.remote()


def _wait() -> None:
    async def forever() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()

    asyncio.run(forever())


def _gpus(config: ServeConfig, scale: Replicas) -> float:
    if scale.gpus is not None:
        return scale.gpus
    wanted = config.models[config.default_model].device != "cpu"
    known = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0  # type: ignore[no-untyped-call]
    return 1.0 if wanted and known else 0.0
