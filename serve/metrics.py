"""What operators can watch: Prometheus metrics under names that do not change.

In one process `text` is what /metrics answers. In a Ray worker every value also goes to Ray's own metrics, which
each node exports with the prefix `ray_`; the dashboard in cluster/grafana reads both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import prometheus_client

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

Kind = Literal["counter", "gauge", "histogram"]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_KINDS: dict[Kind, type[Any]] = {
    "counter": prometheus_client.Counter,
    "gauge": prometheus_client.Gauge,
    "histogram": prometheus_client.Histogram,
}


class Metric:
    """One metric of this process. Label values are given by name and in full."""

    def __init__(
        self, kind: Kind, name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> None:
        self.kind, self.name, self.help, self.labels, self.buckets = kind, name, help, labels, buckets
        more: dict[str, Any] = {"buckets": buckets} if kind == "histogram" else {}
        self._own = _KINDS[kind](name, help, labels, **more)

    def add(self, value: float = 1.0, **labels: str) -> None:
        """Count, for counters."""
        self._child(labels).inc(value)
        if (twin := self._twin()) is not None and value > 0:
            twin.inc(value, labels)

    def set(self, value: float, **labels: str) -> None:
        """The present value, for gauges."""
        self._child(labels).set(value)
        if (twin := self._twin()) is not None:
            twin.set(value, labels)

    def observe(self, value: float, **labels: str) -> None:
        """One more observation, for histograms."""
        self._child(labels).observe(value)
        if (twin := self._twin()) is not None:
            twin.observe(value, labels)

    def _child(self, labels: dict[str, str]) -> Any:
        return self._own.labels(**labels) if self.labels else self._own

    def _twin(self) -> Any:
        """The metric of Ray, when this process is one of Ray's."""
        ray = sys.modules.get("ray")
        return self._rays if ray is not None and ray.is_initialized() else None

    @cached_property
    def _rays(self) -> Any:
        from ray.util import metrics

        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
        more: dict[str, Any] = {"boundaries": list(self.buckets)} if self.kind == "histogram" else {}
        return kinds[self.kind](self.name, description=self.help, tag_keys=tuple(self.labels), **more)


REQUESTS = Metric("counter", "diffray_requests_total", "Answers sent.", ("dialect", "status"))
REQUEST_SECONDS = Metric(
    "histogram", "diffray_request_seconds", "From request to whole answer.", ("dialect",)
)
REJECTIONS = Metric("counter", "diffray_rejections_total", "Refusals, by their code.", ("reason",))
ADMITTED_IMAGES = Metric("gauge", "diffray_admitted_images", "Images that wait or run, at the ingress.")
ADMITTED_COST = Metric("gauge", "diffray_admitted_cost", "Their megapixel-steps.")
QUEUED_IMAGES = Metric("gauge", "diffray_queued_images", "Images that wait in an engine.", ("model",))
RUNNING_IMAGES = Metric("gauge", "diffray_running_images", "Images in an engine's hands.", ("model",))
OCCUPANCY = Metric(
    "histogram", "diffray_batch_occupancy", "Images of a step over the batch size.", ("model",), SHARES
)
STEP_SECONDS = Metric("histogram", "diffray_step_seconds", "One denoising step of a batch.", ("model",))
PHASE_SECONDS = Metric(
    "histogram", "diffray_phase_seconds", "Of one image: queue, prepare, denoise, decode, encode.", ("phase",)
)
IMAGES = Metric("counter", "diffray_images_total", "Images made.", ("model",))
PIXELS = Metric("counter", "diffray_pixels_total", "Their pixels.", ("model",))
FAILURES = Metric("counter", "diffray_failures_total", "Images that failed while they were made.", ("model",))
CANCELLED = Metric(
    "counter", "diffray_cancelled_total", "Images taken back before they were done.", ("model",)
)
RATE_STORE_FAILURES = Metric(
    "counter", "diffray_rate_store_failures_total", "Times that the shared store of rates did not answer."
)
REPLAYS = Metric("counter", "diffray_idempotent_replays_total", "Answers given again for the same key.")
MODEL_LOADS = Metric("counter", "diffray_model_loads_total", "Models read into memory.", ("model",))
MODEL_HITS = Metric("counter", "diffray_model_hits_total", "Images whose model was in memory.", ("model",))
MODEL_BYTES = Metric(
    "gauge",
    "diffray_model_bytes",
    "Weights in memory, adapters' included; 0 after they were let go.",
    ("model",),
)
ADAPTER_BYTES = Metric(
    "gauge",
    "diffray_adapter_bytes",
    "What adapters take of that: their own weights, and the model's that they change.",
    ("model",),
)
DEVICE_BYTES = Metric("gauge", "diffray_device_bytes", "Accelerator memory in use.")
RETRIES = Metric("counter", "diffray_replica_retries_total", "Images begun again on another replica.")


def text() -> tuple[bytes, str]:
    """All metrics of this process in Prometheus' format, and its media type."""
    return prometheus_client.generate_latest(), prometheus_client.CONTENT_TYPE_LATEST
