"""Judge the embedded model on held-out captions: `python -m training.evaluate [--count 500] [--json FILE]`.

Captions come from scenes drawn with a seed that training never used. Reports the share judged right, and each
attribute apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffray.model import Engine, ImageRequest, load_model

from .judge import Verdict, judge
from .scenes import Scene, random_scene

HELD_OUT = 987_654_321


def held_out(count: int) -> list[Scene]:
    """`count` scenes whose captions were not trained on by seed (some captions recur: there are few words)."""
    rng = np.random.default_rng(HELD_OUT)
    return [random_scene(rng) for _ in range(count)]


def share(values: Sequence[bool | None]) -> float | None:
    """Share of True among the values that are not None."""
    asked = [value for value in values if value is not None]
    return round(sum(asked) / len(asked), 4) if asked else None


def summary(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Shares judged right: overall, and per attribute."""
    names = ("right", "count", "colour", "shape", "relation", "size", "background")
    return {name: share([getattr(v, name) for v in verdicts]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=None)
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="write the first 60 pictures as one image")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scenes = held_out(options.count)
    engine = Engine(load_model(options.model))
    started = time.time()
    results = engine.generate(
        ImageRequest(
            prompt=scene.caption, seed=index, steps=options.steps, sampler=options.sampler,
            guidance_scale=options.guidance_scale,
        )
        for index, scene in enumerate(scenes)
    )  # fmt: skip
    seconds = time.time() - started
    images = [result.image for result in results if result.image is not None]
    verdicts = [judge(scene, image) for scene, image in zip(scenes, images, strict=True)]
    one = [v for s, v in zip(scenes, verdicts, strict=True) if len(s.things) == 1]
    two = [v for s, v in zip(scenes, verdicts, strict=True) if len(s.things) == 2]
    report = {
        "captions": len(scenes),
        "steps": options.steps,
        "sampler": results[0].request.sampler,
        "guidance_scale": results[0].request.guidance_scale,
        "all": summary(verdicts),
        "one object": summary(one),
        "two objects": summary(two),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.sheet:
        side = images[0].width + 4
        sheet = Image.new("RGB", (12 * side, 5 * side))
        for index, image in enumerate(images[:60]):
            sheet.paste(image, (index % 12 * side, index // 12 * side))
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(options.sheet)


if __name__ == "__main__":
    main()
