"""The comparisons with diffusers: one forward, one image, one decode, mixed queues, batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffray.model import Engine

from . import workload
from .models import Pair
from .pairing import Effort, Measurement, compare

DIFFRAY, DIFFUSERS = "diffray", "diffusers"
CURVE = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run of the benchmarks asks for.

    Attributes:
        size: side of the images in pixels.
        steps: sampler steps where all images have equally many.
        batch: images per UNet forward and per decode; also the queues' largest batch, on both sides.
        rows: rows of the engine's network calls in queues and curves; None is the engine's own choice.
        requests, low, high: length of a queue, and the range of its step counts.
        compile: run both sides' UNets, and decoders where they are timed alone, through `torch.compile`.
    """

    size: int
    steps: int
    batch: int
    rows: int | None
    requests: int
    low: int
    high: int
    compile: bool
    effort: Effort


Case = Callable[[Pair, Settings], Iterator[Measurement]]


def unet(pair: Pair, settings: Settings) -> Iterator[Measurement]:
    """One forward of the denoiser on `batch` images with guidance: two rows each, timesteps all different."""
    ours, rows, random = pair.ours, 2 * settings.batch, torch.Generator().manual_seed(0)
    config = ours.config.unet
    side = settings.size // ours.config.vae.factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(pair.device, pair.dtype)

    x, context = normal(rows, config.in_channels, side, side), normal(rows, 77, config.context_dim)
    times = torch.linspace(1, 999, rows).round().to(pair.device)
    added: Tensor | None = None
    keywords: dict[str, Any] = {}
    if config.added_dim is not None:
        pooled = normal(rows, ours.config.text[-1].projection_dim or 0)
        sizes = torch.full((rows, 6), float(settings.size), device=pair.device)
        keywords["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        added = torch.cat(
            [pooled.float(), pair.theirs.unet.add_time_proj(sizes.flatten()).reshape(rows, -1)], dim=1
        )
    mine, other = _compiled(ours.unet, settings), _compiled(pair.theirs.unet, settings)

    @torch.inference_mode()
    def run_ours() -> Tensor:
        return mine(x, times, context, added)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def run_theirs() -> Tensor:
        return other(x, times, encoder_hidden_states=context, return_dict=False, **keywords)[0]  # type: ignore[no-any-return]

    yield _compare(
        pair, settings, "unet", {DIFFRAY: run_ours, DIFFUSERS: run_theirs}, "forward", 1, batch=True
    )


def vae(pair: Pair, settings: Settings) -> Iterator[Measurement]:
    """Latents to pixels."""
    config = pair.ours.config.vae
    side = settings.size // config.factor
    shape = (settings.batch, config.latent_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pair.device)
    scaled = (latents / config.scale).to(pair.ours.vae.dtype)
    decoder, theirs = pair.ours.vae, pair.theirs.vae
    if settings.compile:
        decoder.decoder.compile(dynamic=False)
        theirs.decoder.compile(dynamic=False)

    @torch.inference_mode()
    def run_ours() -> Tensor:
        return decoder.decode(latents)

    @torch.inference_mode()
    def run_theirs() -> Tensor:
        return theirs.decode(scaled, return_dict=False)[0]  # type: ignore[no-any-return]

    arms = {DIFFRAY: run_ours, DIFFUSERS: run_theirs}
    yield _compare(pair, settings, "vae", arms, "image", settings.batch, batch=True)


def image(pair: Pair, settings: Settings) -> Iterator[Measurement]:
    """One whole image, prompt to pixels; also with the engine as it is by default, where that pads the call."""
    requests = workload.same(1, settings.steps, settings.size)
    engine = Engine(pair.ours, batch_size=1, compile=settings.compile)
    default = Engine(pair.ours, compile=settings.compile)
    with _theirs_compiled(pair, settings):
        arms = {
            DIFFRAY: partial(workload.ours, engine, requests),
            DIFFUSERS: partial(workload.theirs, pair, requests, 1),
        }
        if default.rows != engine.rows:
            arms[f"{DIFFRAY}, default engine ({default.rows} rows)"] = partial(
                workload.ours, default, requests
            )
        yield _compare(pair, settings, f"image-{settings.steps}steps", arms, "image", 1)


def queue(pair: Pair, settings: Settings) -> Iterator[Measurement]:
    """Mixed requests: through one engine, one by one, and in static batches of requests that are alike."""
    engine = Engine(pair.ours, batch_size=settings.batch, rows=settings.rows, compile=settings.compile)
    with _theirs_compiled(pair, settings):
        for mix in (workload.menu, workload.varied):
            requests = mix(settings.requests, settings.low, settings.high, settings.size)
            arms = {
                DIFFRAY: partial(workload.ours, engine, requests),
                f"{DIFFUSERS}, one by one": partial(workload.theirs, pair, requests, 1),
                f"{DIFFUSERS}, static batches": partial(workload.theirs, pair, requests, settings.batch),
            }
            found = _compare(
                pair,
                settings,
                f"queue-{mix.__name__}-rows{engine.rows}",
                arms,
                "image",
                len(requests),
                batch=True,
            )
            found.settings |= {"steps": f"{settings.low} to {settings.high}", "requests": len(requests)}
            found.settings["rows"] = engine.rows
            yield found


def curve(pair: Pair, settings: Settings) -> Iterator[Measurement]:
    """Equal requests in batches of 1, 2, 4, ... images: where throughput levels off, on both sides."""
    with _theirs_compiled(pair, settings):
        for count in (n for n in CURVE if n <= settings.batch):
            requests = workload.same(count, settings.steps, settings.size)
            engine = Engine(pair.ours, batch_size=count, rows=settings.rows, compile=settings.compile)
            arms = {
                DIFFRAY: partial(workload.ours, engine, requests),
                DIFFUSERS: partial(workload.theirs, pair, requests, count),
            }
            yield _compare(pair, settings, f"curve-{count}-rows{engine.rows}", arms, "image", count)


CASES: dict[str, Case] = {"unet": unet, "vae": vae, "image": image, "queue": queue, "curve": curve}


class _theirs_compiled:  # noqa: N801
    """diffusers' pipeline with its UNet compiled, for the time of one case."""

    def __init__(self, pair: Pair, settings: Settings) -> None:
        self._pipeline, self._eager, self._settings = pair.theirs, pair.theirs.unet, settings

    def __enter__(self) -> None:
        self._pipeline.unet = _compiled(self._eager, self._settings)

    def __exit__(self, *_: object) -> None:
        self._pipeline.unet = self._eager


def _compiled(network: Any, settings: Settings) -> Any:
    return torch.compile(network, dynamic=False) if settings.compile else network


def _compare(
    pair: Pair,
    settings: Settings,
    name: str,
    arms: dict[str, Callable[[], Tensor]],
    unit: str,
    units: float,
    *,
    batch: bool = False,
) -> Measurement:
    dtype = str(pair.dtype).removeprefix("torch.")
    facts = {
        "model": pair.name,
        "size": settings.size,
        "steps": settings.steps,
        "dtype": dtype,
        "compile": settings.compile,
    }
    if batch:
        facts["batch"] = settings.batch
        name += f"-b{settings.batch}"
    full = "-".join([name, pair.name, str(settings.size), dtype, *(["compiled"] if settings.compile else [])])
    return compare(
        full,
        arms,
        unit=unit,
        units=units,
        settings=facts,
        device=pair.device,
        dtype=pair.dtype,
        effort=settings.effort,
    )
