"""A backend without a model: what a prompt says is what happens, and what was asked is remembered."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from dataclasses import replace

from PIL import Image

from diffray.model import GenerationError, InvalidRequest, OutOfMemory
from diffray.serve.config import ServeConfig
from diffray.serve.refusal import Refusal
from diffray.serve.work import Event, Finished, ModelCard, Progress, Work

REFUSALS = {
    400: "invalid_prompt",
    401: "unauthorized",
    403: "forbidden",
    404: "model_not_found",
    409: "conflict",
    429: "rate_limited",
    503: "queue_full",
    504: "timeout",
}


class Scripted:
    """Prompts: "refuse 429" is refused each time, "busy" the first time only, "fail", "huge" and "invalid" raise,
    "late" fails after a step, "wait" waits until cancelled after half its steps; others become a picture of one colour.
    """

    def __init__(self, config: ServeConfig | None = None, **card: object) -> None:
        self.works: list[Work] = []
        self.cancelled = 0
        values = {
            "name": "scripted",
            "family": "sd1",
            "task": "text",
            "checksum": "c0ffee" * 10 + "0000",
            "width": 512,
            "height": 512,
            "steps": 20,
            "guidance_scale": 7.0,
            "sampler": "euler",
            "schedule": "karras",
            "factor": 8,
            "loaded": True,
        }
        self.card = ModelCard(**values | card)  # type: ignore[arg-type]

    async def cards(self) -> list[ModelCard]:
        return [self.card, replace(self.card, name="other", checksum="0ddba11" * 9 + "0")]

    async def model(self, name: str) -> ModelCard:
        for card in await self.cards():
            if name in (card.name, "embedded"):  # the name that a plain config has as its default
                return card
        raise Refusal(404, "model_not_found", f"there is no model {name!r}", field="model")

    async def check(self) -> None:
        """Always well."""

    def sample(self) -> None:
        """Has no gauges."""

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        self.works.append(work)
        request, word = work.request, work.request.prompt.partition(" ")
        if word[0] == "refuse":
            raise Refusal(
                int(word[2]), REFUSALS[int(word[2])], "no, since the test says so", retry_after=0.01
            )
        if word[0] == "busy" and self.works.count(work) == 1:
            raise Refusal(503, "queue_full", "try again", retry_after=0.01)
        if word[0] == "fail":
            raise GenerationError("/secret/path: device lost on host gpu-17")
        if word[0] == "huge":
            raise OutOfMemory("denoise: 64x64 does not fit the device's memory: /secret/path, gpu-17")
        if word[0] == "invalid":
            raise InvalidRequest("schedule", "got 'x', allowed is another")
        steps = request.steps or self.card.steps
        size = (request.width or self.card.width, request.height or self.card.height)
        colour = tuple((request.seed * 37 + shift) % 256 for shift in (10, 90, 170))
        try:
            for step in range(1, steps + 1):
                due = work.preview_every and step % work.preview_every == 0
                yield Progress(
                    step, steps, encoded(Image.new("RGB", (64, 64), colour), "jpeg") if due else None
                )
                if word[0] == "late":
                    raise GenerationError("not finite")
                if word[0] == "wait" and step >= steps // 2:
                    await asyncio.sleep(3600)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        filled = replace(
            request,
            init_image=None,
            mask=None,
            width=size[0],
            height=size[1],
            steps=steps,
            guidance_scale=self.card.guidance_scale
            if request.guidance_scale is None
            else request.guidance_scale,
            sampler=request.sampler or self.card.sampler,
            schedule=request.schedule or self.card.schedule,
        )
        data = encoded(Image.new("RGB", size, colour), work.format)
        yield Finished(data, filled, work.model, self.card.checksum, {"denoise": 0.1})


def encoded(image: Image.Image, format: str) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format)
    return sink.getvalue()
