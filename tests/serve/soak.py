"""Faults at length, with figures: `python -m tests.serve.soak [SCENARIO ...] [--requests N] [--results DIR]`.

Each scenario starts `diffray serve` on the embedded model as a process of its own and prints one JSON line. It fails
with a message when a promise is broken.

    mixed        N requests of every kind: memory and open files stay flat
    flood        one client sends all it can: another one's latency
    disconnects  clients that hang up at any moment: what is left behind
    slowloris    connections that never finish a request: everybody else's latency
    poison       requests that fail among others: the others' bytes
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from benchmarks import machine
from diffray.model import ImageRequest

from .ask import ask, connect, post

IMAGES = "/v1/diffray/images"
SMALL = {"width": 32, "height": 32, "steps": 1}


@dataclass(frozen=True)
class Served:
    """A service in another process."""

    url: str
    pid: int

    @property
    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    @property
    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = ask(self.url + "/metrics").data.decode().splitlines()
        found = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return sum(float(value) for key, _, value in found if key.partition("{")[0] == name)

    @property
    def seconds(self) -> tuple[float, float]:
        """CPU time so far: of the thread that answers HTTP, and of all the others, which make the images."""
        process, http = (_cpu(f"/proc/{self.pid}/{part}stat") for part in ("", f"task/{self.pid}/"))
        return http, process - http

    def idle(self) -> None:
        """Wait until nothing waits or runs."""
        for _ in range(600):
            ask(self.url + "/readyz")
            if not any(map(self.metric, ("diffray_admitted_images", "diffray_running_images"))):
                return
            time.sleep(0.1)
        raise SystemExit("work is left behind")


def _cpu(stat: str) -> float:
    """User and system seconds in a file of /proc."""
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(**config: Any) -> Iterator[Served]:
    """`diffray serve` with a config, ready."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump({"port": 0, "log": "off", **config}))
        command = [
            sys.executable,
            "-c",
            "from diffray.cli import main; main()",
            "serve",
            "--config",
            str(file),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0].rstrip("/")
            assert process.stdout.readline().strip() == "ready"
            yield Served(url, process.pid)
        finally:
            process.terminate()
            code = process.wait(60)
            if code:
                raise SystemExit(f"the service ended with {code}")


KINDS = {
    "image": 30,
    "stream": 10,
    "picture": 10,
    "openai": 10,
    "a1111": 10,
    "bad": 10,
    "hang up": 10,
    "retry": 5,
    "job": 5,
}
"""Kinds of requests in a mix, by their share."""
BAD = (b"{", b"[" * 2000, b'{"width": 63}', b'{"sampler": "x"}', b'{"init_image": "AAAA"}')


def _picture() -> str:
    sink = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


def _any(url: str, number: int, source: str) -> str:
    """Send request `number` of a mix; returns its kind, and the status of the answer where it is worth counting."""
    rng = random.Random(number)
    body: dict[str, Any] = {
        "prompt": f"shape {number}",
        "steps": rng.choice((1, 1, 2)),
        "seed": number,
        "width": rng.choice((16, 24, 32)),
        "height": rng.choice((16, 32)),
    }
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    if kind == "hang up":
        with suppress(OSError):
            wire = post(url + IMAGES, {**body, "steps": 20})
            time.sleep(rng.random() * 0.05)
            wire.close()
        return kind
    if kind == "bad":
        status = ask(url + IMAGES, rng.choice(BAD)).status
        assert status in (400, 422), status
        return kind
    paths = {
        "openai": "/v1/images/generations",
        "a1111": "/sdapi/v1/txt2img",
        "job": "/v1/diffray/jobs",
    }
    bodies: dict[str, dict[str, Any]] = {
        "stream": {**body, "stream": True, "preview_every": 1},
        "picture": {"init_image": source, "strength": 0.5, "steps": 2},
        "openai": {"prompt": "x", "size": "32x32", "num_inference_steps": 1},
        "a1111": {"prompt": "x", **SMALL},
    }
    headers = {"idempotency_key": str(number // 50)} if kind == "retry" else {}
    return f"{kind} {ask(url + paths.get(kind, IMAGES), bodies.get(kind, body), **headers).status}"


def mixed(requests: int) -> dict[str, Any]:
    """Every kind of request, good and bad; memory and files are compared after the first tenth and at the end."""
    source, tenth = _picture(), max(requests // 10, 1)
    config = {"store": {"seconds": 5}, "limits": {"idempotency_seconds": 5}}
    with served(**config) as service, ThreadPoolExecutor(16) as pool:

        def some(first: int) -> list[str]:
            return list(
                pool.map(lambda number: _any(service.url, number, source), range(first, first + tenth))
            )

        some(0)
        service.idle()
        before = (service.megabytes, service.files)
        begun = time.monotonic()
        marks: list[float] = []
        outcomes: Counter[str] = Counter()
        for first in range(tenth, requests, tenth):
            outcomes.update(some(first))
            marks.append(round(service.megabytes, 1))
        seconds = time.monotonic() - begun
        service.idle()
        after = (service.megabytes, service.files)
    figures = {
        "requests": requests,
        "per_second": round(outcomes.total() / seconds, 1),
        "megabytes": [round(before[0], 1), *marks, round(after[0], 1)],
        "files": [before[1], after[1]],
        "outcomes": dict(sorted(outcomes.items())),
    }
    flat = after[0] - before[0] < 40 and abs(after[1] - before[1]) < 12
    _promise(flat, "memory or files grew", figures)
    failed = [name for name in outcomes if name.split()[-1][:1] == "5"]
    _promise(not failed, f"{failed}", figures)
    return figures


def flood(requests: int) -> dict[str, Any]:
    """Two keys: one asks for as much as it may, all the time; the other for one small picture now and then."""
    from diffray.serve import keys

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        loud, calm = (f"Bearer {keys.add(file, name)}" for name in ("loud", "calm"))
        with served(access={"keys": str(file)}) as service, ThreadPoolExecutor(70) as pool:
            alone = [_timed(service, calm) for _ in range(10)]
            over = threading.Event()

            def shout(number: int) -> Counter[int]:
                statuses: Counter[int] = Counter()
                while not over.is_set():
                    body = {"prompt": "loud", "seed": number, "steps": 20}
                    status = ask(service.url + IMAGES, body, authorization=loud).status
                    statuses[status] += 1
                    if status == 429:
                        time.sleep(0.02)
                return statuses

            shouting = [pool.submit(shout, number) for number in range(70)]
            time.sleep(3)
            waiting = service.metric("diffray_admitted_images")
            before, made = _clocks(service), service.metric("diffray_images_total")
            beside = [_timed(service, calm) for _ in range(min(20, requests))]
            spent = [now - then for now, then in zip(_clocks(service), before, strict=True)]
            rate = (service.metric("diffray_images_total") - made) / spent[0]
            over.set()
            statuses: Counter[int] = sum((done.result() for done in shouting), Counter())
    figures = {
        "alone": _latency(alone),
        "beside_flood": _latency(beside),
        "images_waiting": waiting,
        "images_per_second": round(rate, 1),
        "flood_statuses": dict(statuses),
        "cores": {
            name: round(seconds / spent[0], 2)
            for name, seconds in zip(("load_generator", "http", "engine"), spent[1:], strict=True)
        },
    }
    _promise(waiting > 30, "it was no flood", figures)
    in_line = waiting / rate  # what the calm one would wait without fairness
    _promise(figures["beside_flood"]["all"] < in_line / 3, "the calm client waits in the line", figures)
    return figures


def _clocks(service: Served) -> tuple[float, ...]:
    """Wall time, and CPU time of this process, of the service's HTTP side and of its engine."""
    return (time.monotonic(), time.process_time(), *service.seconds)


def _latency(answers: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of the middle and of the slowest answer, and where the time of the middle one was spent."""
    ordered = sorted(answers, key=lambda answer: answer["all"])
    middle = {name: round(seconds, 3) for name, seconds in ordered[len(ordered) // 2].items()}
    return middle | {"max": round(ordered[-1]["all"], 3)}


def _timed(service: Served, key: str) -> dict[str, float]:
    """Seconds until the answer, and of the phases in the engine."""
    begun = time.monotonic()
    answer = ask(service.url + IMAGES, {"prompt": "calm", "steps": 4}, authorization=key)
    assert answer.status == 200, answer.data
    return {"all": time.monotonic() - begun, **answer.json["images"][0]["timings"]}


def disconnects(requests: int) -> dict[str, Any]:
    """Storms of clients that hang up; then the service is as quick as before, and nothing is left."""
    with served() as service, ThreadPoolExecutor(32) as pool:
        quick = _seconds(service)
        files = service.files

        def storm(number: int) -> None:
            rng = random.Random(number)
            with suppress(OSError):
                body = {"prompt": "gone", "steps": 200, "seed": number, "stream": number % 2 == 0}
                wire = post(service.url + IMAGES, body)
                time.sleep(rng.random() * 0.3)
                wire.close()

        list(pool.map(storm, range(requests)))
        begun = time.monotonic()
        service.idle()
        freed = time.monotonic() - begun
        figures = {
            "hung_up": requests,
            "freed_after": round(freed, 2),
            "files": [files, service.files],
            "one_image": [round(quick, 3), round(_seconds(service), 3)],
            "cancelled": service.metric("diffray_cancelled_total"),
        }
    _promise(figures["files"][1] <= files + 5, "connections are left open", figures)
    _promise(freed < 5 and _as_quick(figures), "those who left still cost time", figures)
    return figures


def _seconds(service: Served) -> float:
    times = []
    for _ in range(5):
        begun = time.monotonic()
        ask(service.url + IMAGES, {"steps": 4})
        times.append(time.monotonic() - begun)
    return statistics.median(times)


def _as_quick(figures: dict[str, Any]) -> bool:
    """Whether one image takes about as long as before."""
    before, after = figures["one_image"]
    return bool(after < 3 * before + 0.1)


def slowloris(requests: int) -> dict[str, Any]:
    """Hundreds of connections drip headers or bodies; others are served meanwhile, and the drips end with 408."""
    count = min(requests, 400)
    with served(limits={"body_seconds": 5}) as service:
        quick = _seconds(service)
        wires = []
        for number in range(count):
            wire = connect(service.url)
            head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\n"
            wire.sendall((head + ("content-length: 100\r\n\r\n " if number % 2 else "")).encode())
            wires.append(wire)
        held = service.files
        during = _seconds(service)
        time.sleep(11)
        answers: Counter[str] = Counter()
        for wire in wires:
            with suppress(OSError):
                answers[wire.recv(12).decode()] += 1
            wire.close()
        time.sleep(0.5)
        figures = {
            "connections": count,
            "one_image": [round(quick, 3), round(during, 3)],
            "files_held": held,
            "files_after": service.files,
            "answers": dict(answers),
        }
    _promise(answers["HTTP/1.1 408"] == count, "not all were closed with 408", figures)
    _promise(_as_quick(figures), "others wait for them", figures)
    return figures


def spoiled(image: Image.Image, request: ImageRequest) -> str | None:
    """A check of pictures that fails on some."""
    if request.prompt == "poison":
        raise MemoryError("a check that fails")
    return None


def poison(requests: int) -> dict[str, Any]:
    """Requests that can only fail run beside good ones, whose files are what they are without them."""
    good = {"prompt": "a red circle", "steps": 4, "seed": 1}
    bad = {"prompt": "poison", "steps": 4}
    late = {"prompt": "x", "steps": 1000, "timeout": 0.05}
    hook = {"image": ["tests.serve.soak:spoiled"]}
    with served(guardrails=hook) as service, ThreadPoolExecutor(12) as pool:
        expected = ask(service.url + IMAGES, good, accept="image/png").data
        bodies = [(good, bad, late)[number % 3] for number in range(min(requests, 300))]
        answers = list(pool.map(lambda body: ask(service.url + IMAGES, body, accept="image/png"), bodies))
        mine = [answer for answer, body in zip(answers, bodies, strict=True) if body is good]
        same = sum(answer.data == expected for answer in mine)
        figures = {
            "good": len(mine),
            "identical": same,
            "statuses_of_bad": dict(
                Counter(a.status for a, b in zip(answers, bodies, strict=True) if b is bad)
            ),
            "statuses_of_late": dict(
                Counter(a.status for a, b in zip(answers, bodies, strict=True) if b is late)
            ),
            "ready_after": ask(service.url + "/readyz").status,
        }
    _promise(same == len(mine) and figures["ready_after"] == 200, "others were harmed", figures)
    return figures


def _promise(kept: bool, broken: str, figures: dict[str, Any]) -> None:
    if not kept:
        raise SystemExit(f"{broken}: {json.dumps(figures)}")


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    f.__name__: f for f in (mixed, flood, disconnects, slowloris, poison)
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--results", type=Path, help="folder for the figures, as the benchmarks' report reads them"
    )
    given = parser.parse_args()
    found = []
    for name in given.scenario or SCENARIOS:
        found.append({"scenario": name, **SCENARIOS[name](given.requests)})
        print(json.dumps(found[-1]), flush=True)
    if given.results:
        machine.save(given.results, "faults", {"faults": found})


if __name__ == "__main__":
    main()
