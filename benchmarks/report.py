"""The results as a table: `python -m benchmarks.report` prints it, `--write` puts it into the README."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from diffray.serve.bench import HEAD
from diffray.serve.bench import table as served_table

from .job import BARE, JOB
from .pairing import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: python -m benchmarks.report --write -->", "<!-- /results -->"
PAIRED = ("measured", "rival", "diffray, s", "rival, s", "ratio, wall", "ratio, CPU", "max diff", "drift")
SCALE = (
    "engines",
    "images",
    "T(1) / (k T(k))",
    "of the ideal",
    "busy",
    "slots full",
    "start, s",
    "whole job, s",
)
PLANNING = ("rows", "what", "s", "peak memory, MiB", "of it imports, MiB")
FAULTS = ("scenario", "found")
JOBS = ("measured", "rival", "what", "rival, s", "job, s", "overhead", "max diff", "drift")


def table(folder: Path = RESULTS) -> str:
    """All results of a folder in Markdown, by the kind of machine they were measured on."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = []
    for kind in sorted({one["kind"] for one in found}):
        here = [one for one in found if one["kind"] == kind]
        parts.append(_machine(here[0]["machine"]))
        paired = [one for one in here if "ratios" in one]
        if rows := [row for one in paired if BARE not in one["ratios"] for row in _paired(one)]:
            parts.append(_table(PAIRED, rows))
        if rows := [row for one in paired if BARE in one["ratios"] for row in _jobs(one)]:
            parts.append(_table(JOBS, rows))
        for one in here:
            if "scale" in one:
                rows = [_scale(row, one["scale"][0]) for row in one["scale"]]
                parts += [_scale_title(one), _table(SCALE, rows)]
            if "planning" in one:
                parts += ["The driver's part of a large table, before the first image:"]
                parts += [_table(PLANNING, [_planning(row) for row in one["planning"]])]
            if "faults" in one:
                parts += ["The service under abuse (`python -m tests.serve.soak`), s and MB:"]
                parts += [_table(FAULTS, [_fault(row) for row in one["faults"]])]
            if "loads" in one:
                parts += [_served(one), _table(HEAD, [list(cells) for cells in served_table(one["loads"])])]
    return "\n\n".join(parts) or "No results yet."


def write(path: Path = README) -> None:
    """Replace what stands between the marks of the README."""
    head, _, rest = path.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}")


def _paired(one: dict[str, Any]) -> Iterator[list[str]]:
    ours, *_ = one["wall"]
    for rival, clocks in one["ratios"].items():
        per = [median(one["wall"][arm]) / one["units"] for arm in (ours, rival)]
        ratios = [_interval(clocks.get(clock)) for clock in ("wall", "cpu")]
        yield [one["name"], rival, *(f"{p:.4g}" for p in per), *ratios, _distance(one, rival), _drift(one)]


def _jobs(one: dict[str, Any]) -> Iterator[list[str]]:
    for bare, clocks in one["ratios"].items():
        for clock, found in clocks.items():
            seconds = [f"{median(one['wall'][f'{arm}, {clock}']):.4g}" for arm in (bare, JOB)]
            what = "per image, model loaded" if clock == "steady" else "the whole run, start-up included"
            percent = {
                key: round(100 * (value - 1), 1) + 0.0 for key, value in found.items()
            }  # no minus zero
            spread = f"{percent['median']:+.1f} % [{percent['low']:+.1f}, {percent['high']:+.1f}]"
            yield [one["name"], bare, what, *seconds, spread, _distance(one, bare), _drift(one)]


def _served(one: dict[str, Any]) -> str:
    plan = one["plan"]
    sizes = " or ".join(f"{width}x{height}" for width, height in plan["sizes"])
    steps = " or ".join(map(str, plan["steps"]))
    return (
        f"`{one['name']}`: {sizes} in {steps} steps; capacity {one['capacity']:.2f} images/s, "
        f"{one['alone']:.2f} s alone, goodput within {one['deadline']:.2f} s; drift {_drift(one)}."
    )


def _scale_title(one: dict[str, Any]) -> str:
    of = one["settings"]
    slow = f", one engine {of['slow']:g} times slower than the others" if of["slow"] != 1 else ""
    return (
        f"Scheduling on synthetic devices (they sleep {of['step_seconds']:g} s for a step of {of['batch']} images)"
        f": {of['shards_per_engine']} shards of {of['images_per_shard']} images with {of['steps']} steps for each "
        f"engine{slow}."
    )


def _scale(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    shares = [row["efficiency"] / first["efficiency"], row["efficiency"], row["busy"], row["occupancy"]]
    seconds = [f"{row[key]:.1f}" for key in ("start_seconds", "job_seconds")]
    return [
        str(row["engines"]),
        f"{row['images']:,}",
        *(f"{100 * share:.1f} %" for share in shares),
        *seconds,
    ]


def _planning(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['rows']:,}",
        row["what"],
        f"{row['seconds']:.1f}",
        f"{row['peak_mib']:.0f}",
        f"{row['imports_mib']:.0f}",
    ]


def _fault(row: dict[str, Any]) -> list[str]:
    figures = ((name.replace("_", " "), value) for name, value in row.items() if name != "scenario")
    return [row["scenario"], "; ".join(f"{name}: {_plain(value)}" for name, value in figures)]


def _plain(value: Any) -> str:
    """Figures of any depth without brackets of a program; of a long list its ends."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return f"{_plain(value[0])} -> {_plain(value[-1])}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"**{found['median']:.2f}** [{found['low']:.2f}, {found['high']:.2f}]"


def _distance(one: dict[str, Any], rival: str) -> str:
    return f"{one['distance'][rival]['max_abs']:.1e}"


def _drift(one: dict[str, Any]) -> str:
    """How far the yardstick moved while this was measured, as a share of its median."""
    speeds = one["yardstick"]
    return f"{100 * (max(speeds) - min(speeds)) / median(speeds):.0f} %"


def _machine(facts: dict[str, Any]) -> str:
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['cpu_cores']} cores, {facts['cpu_capability']}"
    cuda = f", CUDA {facts['cuda']}, cuDNN {facts['cudnn']}" if "cuda" in facts else ""
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return (
        f"**{device}** ({threads}): torch {facts['torch']}{cuda}, diffusers "
        f"{facts['diffusers']}, transformers {facts['transformers']}, Ray {facts['ray']}, "
        f"Python {facts['python']}."
    )


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    if parser.parse_args().write:
        write()
    else:
        print(table())


if __name__ == "__main__":
    main()
