"""Figures for Prometheus and Ray's dashboard, under names that do not change. Ray puts `ray_` before them.

    diffray_images_total{model}                 counter    images made
    diffray_rejected_total{model, stage}        counter    rows that became no image; stage is plan, generate, encode
    diffray_image_seconds{model, phase}         histogram  per image: text, queue, prepare, denoise, decode, encode
    diffray_engine_occupancy{model}             gauge      share of an engine's image slots in use, 0..1
    diffray_prompts_total{model, source}        counter    prompts asked of text encoders; source is encoded, remembered
    diffray_engines{state}                      gauge      engines starting and running
    diffray_shards{state}                       gauge      shards waiting and running
    diffray_shards_committed_total              counter    shards committed

The first four come from the process of each engine, and are ended images: what a crash undoes is counted again
when it is made again. The prompts come from the encoders of a pool, the others from the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .making.pools import Pulse

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Bounds of the histogram's buckets."""


class ImageMeter:
    """Told about every image of one engine; a `Meter` of `tally.py`."""

    def __init__(self, model: str) -> None:
        from ray.util import metrics

        tags = {"model": model}
        self._images = metrics.Counter("diffray_images_total", "Images made", ("model",))
        self._rejected = metrics.Counter(
            "diffray_rejected_total", "Rows that became no image", ("model", "stage")
        )
        self._seconds = metrics.Histogram(
            "diffray_image_seconds", "Seconds of an image in a phase", SECONDS, ("model", "phase")
        )
        self._occupancy = metrics.Gauge("diffray_engine_occupancy", "Share of image slots in use", ("model",))
        for metric in (self._images, self._rejected, self._seconds, self._occupancy):
            metric.set_default_tags(tags)

    def made(self, seconds: Mapping[str, float]) -> None:
        """An image was made; seconds by phase."""
        self._images.inc()
        for phase, spent in seconds.items():
            self._seconds.observe(spent, {"phase": phase})

    def rejected(self, stage: str) -> None:
        """A row was rejected."""
        self._rejected.inc(tags={"stage": stage})

    def occupancy(self, share: float) -> None:
        """How full the engine is at this moment."""
        self._occupancy.set(share)


class PromptMeter:
    """Told about every prompt of one text encoder."""

    def __init__(self, model: str) -> None:
        from ray.util import metrics

        self._prompts = metrics.Counter(
            "diffray_prompts_total", "Prompts asked of text encoders", ("model", "source")
        )
        self._prompts.set_default_tags({"model": model})

    def answered(self, known: bool) -> None:
        """A prompt was encoded, or remembered if it was known."""
        self._prompts.inc(tags={"source": "remembered" if known else "encoded"})


class PoolMeter:
    """Told about the pools of a job by its driver."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._engines = metrics.Gauge("diffray_engines", "Engines by state", ("state",))
        self._shards = metrics.Gauge(
            "diffray_shards", "Shards of this run that are not committed yet", ("state",)
        )
        self._committed = metrics.Counter("diffray_shards_committed_total", "Shards committed")

    def see(self, pulse: Pulse) -> None:
        """The state now."""
        states = Counter(engine.state for engine in pulse.engines)
        for state in ("starting", "running"):
            self._engines.set(states[state], {"state": state})
        for state, shards in (("waiting", pulse.waiting), ("running", pulse.running)):
            self._shards.set(shards, {"state": state})

    def committed(self) -> None:
        """A shard was committed."""
        self._committed.inc()
