"""The images that the benchmarks ask for, and how diffusers is asked for the same ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffray.model import Engine, ImageRequest
from training.scenes import random_scene

from .models import Pair

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
}
"""diffray's sampler to diffusers' class and settings; timestep spacing is set for both sides."""
SPACING = "leading"


def same(count: int, steps: int, size: int) -> list[ImageRequest]:
    """`count` images that differ in prompt and seed alone: what static batches are best at."""
    return [
        _request(prompt, index, steps, size, "dpmpp_2m", 7.5) for index, prompt in enumerate(captions(count))
    ]


def menu(count: int, low: int, high: int, size: int) -> list[ImageRequest]:
    """A queue with four kinds of request: two samplers, two step counts; static batches still fill."""
    rng = random.Random(1)
    return [
        _request(prompt, index, rng.choice((low, high)), size, rng.choice(("dpmpp_2m", "euler")), 7.5)
        for index, prompt in enumerate(captions(count))
    ]


def varied(count: int, low: int, high: int, size: int) -> list[ImageRequest]:
    """A queue in which nearly every request is its own kind: any steps, sampler and guidance scale."""
    rng = random.Random(2)
    return [
        _request(
            prompt,
            index,
            rng.randint(low, high),
            size,
            rng.choice(list(SCHEDULERS)),
            rng.choice((4.0, 6.0, 7.5, 9.0)),
        )
        for index, prompt in enumerate(captions(count))
    ]


def captions(count: int) -> list[str]:
    """Prompts of the embedded model's kind; always the same list."""
    rng = np.random.default_rng(0)
    return [random_scene(rng).caption for _ in range(count)]


def ours(engine: Engine, requests: Sequence[ImageRequest]) -> Tensor:
    """The images [N, H, W, 3] in 0..1 that diffray's engine makes, in the order asked; no text is cached."""
    engine.model.text.cache.clear()
    return _stack([result.image for result in engine.generate(requests)])


def theirs(pair: Pair, requests: Sequence[ImageRequest], batch: int) -> Tensor:
    """The images that diffusers makes, in the order asked: batches of equal requests, at most `batch` each.

    A pipeline call takes one scheduler, one step count and one guidance scale, so only such requests share one.
    """
    images: list[Image.Image | None] = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: _kind(requests[i]))
    for _, group in groupby(order, key=lambda i: _kind(requests[i])):
        alike = list(group)
        for start in range(0, len(alike), batch):
            chosen = alike[start : start + batch]
            for index, image in zip(chosen, _call(pair, [requests[i] for i in chosen]), strict=True):
                images[index] = image
    return _stack(images)


def _call(pair: Pair, requests: Sequence[ImageRequest]) -> list[Image.Image]:
    first, pipeline = requests[0], pair.theirs
    name, settings = SCHEDULERS[first.sampler or ""]
    config = dict(pipeline.scheduler.config) | settings | {"timestep_spacing": SPACING, "steps_offset": 1}
    pipeline.scheduler = getattr(diffusers, name).from_config(config)
    images: list[Image.Image] = pipeline(
        prompt=[request.prompt for request in requests],
        width=first.width,
        height=first.height,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
    ).images
    return images


def _request(prompt: str, seed: int, steps: int, size: int, sampler: str, guidance: float) -> ImageRequest:
    return ImageRequest(
        prompt=prompt,
        seed=seed,
        steps=steps,
        width=size,
        height=size,
        sampler=sampler,
        schedule=SPACING,
        guidance_scale=guidance,
    )


def _kind(request: ImageRequest) -> tuple[str, int, float]:
    return request.sampler or "", request.steps or 0, request.guidance_scale or 0.0


def _stack(images: Sequence[Image.Image | None]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
