"""Figures for Prometheus and Ray's dashboard, under names that do not change. Ray puts `ray_` before them.

    diffray_images_total{model}                 counter    images made
    diffray_rejected_total{model, stage}        counter    rows that became no image; stage is plan, guard, source,
                                                           generate, check, encode
    diffray_image_seconds{model, phase}         histogram  per image: read, text, queue, prepare, denoise, decode,
                                                           check, encode, as far as it has them
    diffray_engine_occupancy{model}             gauge      share of an engine's image slots in use, 0..1
    diffray_prompts_total{model, source}        counter    prompts asked of text encoders; source is encoded, remembered
    diffray_images{state}                       gauge      the job's images: planned, ended (rejected too), rejected
    diffray_stage_images{stage}                 gauge      images in each stage now: engine, encode, store, text
    diffray_busy_share                          gauge      share of the engines' time in which they had work, 0..1
    diffray_engines{state}                      gauge      engines starting and running
    diffray_shards{state}                       gauge      shards waiting and running
    diffray_shards_committed_total              counter    shards committed

The first four come from the process of each engine and count images as they end: what a crash undoes is counted again
when it is made again. The prompts come from the encoders of a pool. The others come from the driver, and are what its
progress display shows. The two figures that it works out from them are in PromQL:

    images per second   deriv(ray_diffray_images{state="ended"}[1m])
    seconds left        (ray_diffray_images{state="planned"} - ignoring(state) ray_diffray_images{state="ended"})
                        / ignoring(state) deriv(ray_diffray_images{state="ended"}[1m])
"""

from __future__ import annotations

from collections.abc import Mapping

from .making.pools import Pulse
from .standing import Standing

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


class JobMeter:
    """Told how far a job is by its driver. Without Ray there are no pulses, and it shows nothing."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._gauges: _JobGauges | None = None
        self._committed = 0

    def advance(self, images: int, rejected: int) -> None:
        """A shard was committed."""
        self._standing.advance(images, rejected)
        self._committed += 1

    def pulse(self, pulse: Pulse) -> None:
        """The engines were looked at."""
        self._standing.see(pulse)
        self._gauges = self._gauges or _JobGauges()
        self._gauges.show(self._standing, pulse)
        if self._committed:
            self._gauges.committed.inc(self._committed)
        self._committed = 0


class _JobGauges:
    def __init__(self) -> None:
        from ray.util import metrics

        self._images = metrics.Gauge("diffray_images", "Images of the job", ("state",))
        self._stages = metrics.Gauge("diffray_stage_images", "Images in each stage", ("stage",))
        self._busy = metrics.Gauge("diffray_busy_share", "Share of the engines' time with work")
        self._engines = metrics.Gauge("diffray_engines", "Engines by state", ("state",))
        self._shards = metrics.Gauge(
            "diffray_shards", "Shards of this run that are not committed yet", ("state",)
        )
        self.committed = metrics.Counter("diffray_shards_committed_total", "Shards committed")

    def show(self, now: Standing, pulse: Pulse) -> None:
        """The state now."""
        for state, images in (("planned", now.total), ("ended", now.ended), ("rejected", now.rejected)):
            self._images.set(images, {"state": state})
        for stage, images in now.inside.items():
            self._stages.set(images, {"stage": stage})
        if now.busy is not None:
            self._busy.set(now.busy)
        for state in ("starting", "running"):
            self._engines.set(now.engines(state), {"state": state})
        for state, shards in (("waiting", pulse.waiting), ("running", pulse.running)):
            self._shards.set(shards, {"state": state})
