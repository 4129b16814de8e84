"""Measure: `python -m benchmarks.run unet|vae|image|queue|curve|job|serve|all [--model embedded|sd15|sdxl]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from diffray.serve.load import Plan

from . import job
from .cases import CASES, Settings
from .models import load
from .pairing import RESULTS, Effort, Measurement
from .serving import Served, serving

SIDES = {"embedded": 64, "sd15": 512, "sdxl": 1024}
ALL = ("unet", "vae", "image", "queue", "job")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 also where the asked device is not there, which is said."""
    options = _parser().parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: no CUDA device here", file=sys.stderr)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name in ALL if options.case == "all" else (options.case,):
        for found in _measured(name, options):
            print(found.line(), flush=True)
            if not options.quick:
                print(f"  {found.save(options.results)}", flush=True)
    return 0


def _measured(name: str, options: argparse.Namespace) -> Iterator[Measurement | Served]:
    quick = options.quick
    effort = Effort(2, 0.0) if quick else Effort(options.blocks, options.seconds)
    size = options.size or SIDES.get(options.model, 512)
    if name == "job":
        count = 2 if quick else options.requests
        yield job.overhead(options.model, size, 1 if quick else options.steps, count, options.batch, effort)
        return
    if name == "serve":
        yield _serving(options, size)
        return
    settings = Settings(
        size=size,
        steps=2 if quick else options.steps,
        batch=options.batch if name in ("queue", "curve") else options.images,
        rows=options.rows,
        requests=4 if quick else options.requests,
        low=2 if quick else options.low,
        high=3 if quick else options.high,
        compile=options.compile,
        effort=effort,
    )
    pair = load(options.model, device=options.device, dtype=options.dtype)
    yield from CASES[name](pair, settings)


def _serving(options: argparse.Namespace, size: int) -> Served:
    """Two sizes and three step counts, every load for `--seconds`, which has to be many answers."""
    plan = Plan(
        sizes=((size, size), (size, size * 3 // 4)),
        steps=(options.low, options.steps, options.high),
        shares=(0.8,) if options.quick else (0.4, 0.7, 0.9),
        seconds=3.0 if options.quick else options.seconds,
    )
    turns = 1 if options.quick else 3
    return serving(
        options.model, plan, device=options.device, dtype=options.dtype, batch=options.batch, turns=turns
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("case", choices=(*CASES, "job", "serve", "all"))
    parser.add_argument("--model", default="embedded", help="embedded, sd15, sdxl, or a diffusers folder")
    parser.add_argument("--size", type=int, help="side in pixels; default is the model's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--images", type=int, default=1, help="images per forward (unet) and per decode (vae)"
    )
    parser.add_argument("--batch", type=int, default=8, help="largest batch of queue, curve and job")
    parser.add_argument("--rows", type=int, help="rows of the engine's network calls (queue, curve)")
    parser.add_argument("--requests", type=int, default=24, help="images in a queue or a job")
    parser.add_argument("--low", type=int, default=10, help="fewest steps in a queue")
    parser.add_argument("--high", type=int, default=40, help="most steps in a queue")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--threads", type=int, help="torch's CPU threads")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="least seconds of one sample; of one load (serve)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="smoke: two short blocks, nothing written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
