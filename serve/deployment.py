"""The Ray Serve application: an ingress on CPUs, replicas with engines, autoscaling between them."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from .app import create_app
from .config import Replicas, ServeConfig
from .replica import HandleBackend, Replica, multiplexed
from .service import Service, check_access

APPLICATION = "diffray"
HEALTH_SECONDS = 5.0
DRAIN_MARGIN = 30.0
"""Seconds that a replica may take to stop beyond the longest generation."""
UNLIMITED = 100_000
"""Requests that an ingress may hold: what waits is bounded by admission, and polls must get through."""


@serve.ingress()
class Ingress:
    """The HTTP side. It has no accelerator, and state only in counters and running requests."""

    def __init__(self, values: dict[str, Any], engines: DeploymentHandle[Any]) -> None:
        config = ServeConfig.checked(values)
        self.service = Service(config, HandleBackend(config, engines))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)


def application(config: ServeConfig) -> serve.Application:
    """What `serve run` and `serve deploy` run.

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
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    replica: type[Replica] = multiplexed(config.memory.models) if len(config.models) > 1 else Replica
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
            look_back_period_s=max(2.0, min(30.0, scale.upscale_seconds)),
        ),
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
    """Serve on Ray until SIGINT or SIGTERM.

    Raises:
        InvalidConfig: anybody could use the service.
        RuntimeError: the application did not become healthy (Ray).
    """
    app = application(config)
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
    said(f"http://{config.host}:{config.port}/  loading {config.default_model} ...")
    serve.run(app, name=APPLICATION, route_prefix="/")
    said("ready")
    try:
        _wait()
    finally:
        serve.delete(APPLICATION)
        if started:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


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
