"""status, verify, retry-rejected and gc as one types them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from diffray.cli.storage import storage_from
from diffray.pipelines import JobConfig, Workers, retry_rejected
from tests.pipelines.fake import FakeEngine

from .conftest import diffray


@pytest.fixture
def out(table: Path, tmp_path: Path, fake: None) -> Path:
    """A finished job of one image and one rejected row."""
    assert diffray("generate", table, tmp_path / "out")[0] == 0
    return tmp_path / "out"


def test_status_in_words_and_as_json(out: Path) -> None:
    code, text, _ = diffray("status", out)
    assert (code, text.splitlines()) == (
        0,
        ["2 of 2 images ended, 1 of them rejected", "1 of 1 shards committed; complete"],
    )
    code, text, _ = diffray("status", out, "--json")
    state = json.loads(text)
    assert (state["planned"], state["images"], state["rejected"], state["ended"]) == (2, 1, 1, 2)
    (out / "_diffray/SUCCESS.json").unlink()
    assert diffray("status", out)[1].splitlines()[1:] == [
        "1 of 1 shards committed; stopped",
        "run its command again to go on",
    ]


def test_verify_and_repair(out: Path, table: Path) -> None:
    code, text, _ = diffray("verify", out)
    assert (code, text.startswith("1 images and 1 rejected rows in 1 shards; ")) == (0, True)
    assert text.endswith("all as recorded\n")
    part = out / "data/part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    code, text, _ = diffray("verify", out)
    assert code == 1
    assert text.splitlines()[0] == (
        f"damaged: data/part-00000.parquet: {len(whole) - 1} bytes, {len(whole)} recorded"
    )
    assert json.loads(diffray("verify", out, "--json")[1])["damaged"] == [0]
    code, text, _ = diffray("verify", out, "--repair")
    assert (code, text.splitlines()[-1]) == (1, "1 shards taken back; run the job's command again")
    assert diffray("generate", table, out)[0] == 0
    assert part.read_bytes() == whole
    assert diffray("verify", out)[0] == 0


def test_verify_of_an_unfinished_job_exits_1(out: Path, table: Path) -> None:
    for record in ("commits/00000.json", "SUCCESS.json"):
        (out / "_diffray" / record).unlink()
    for flags in ([], ["--repair"]):
        code, text, _ = diffray("verify", out, *flags)
        assert (code, text.splitlines()[-1]) == (
            1,
            "2 of 2 planned images are not made yet; run the job's command again",
        )
    code, text, _ = diffray("verify", out, "--json")
    assert (code, json.loads(text)["planned"], json.loads(text)["missing"]) == (1, 2, 2)
    assert diffray("generate", table, out)[0] == 0
    code, text, _ = diffray("verify", out, "--json")
    assert (code, json.loads(text)["missing"]) == (0, 0)


def test_retry_rejected(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffray("retry-rejected", out)[1].startswith("1 images, 1 still rejected, ")
    assert diffray("retry-rejected", out, "--max-rejected", 0.4)[0] == 4
    monkeypatch.setattr(FakeEngine, "poisonous", False)
    assert diffray("retry-rejected", out)[1].startswith("2 images, 0 still rejected, ")
    assert diffray("retry-rejected", out)[1] == f"nothing to do: no row of {out} is rejected\n"
    assert diffray("verify", out)[0] == 0


def test_retries_go_on_with_the_workers_that_are_named_and_the_last_runs_for_the_rest(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = out.with_name("again")
    assert diffray("generate", table, again, "--patience", 9)[0] == 2, "no flag of its own"
    first = ["--job", "workers.patience=9", "--price-per-hour", 3, "--gpus", 0.5, "--label", "zone=a"]
    assert diffray("generate", table, again, *first)[0] == 0
    used, defaults = [], retry_rejected.__kwdefaults__ or {}
    generate = defaults["generate"]

    def watched(config: JobConfig, *arguments: Any) -> Any:
        used.append(config.workers)
        return generate(config, *arguments)

    monkeypatch.setitem(defaults, "generate", watched)
    flags = ["--gpus", 1, "--accelerator", "H100", "--text-encoders", 2, "--job", "workers.crashes=5"]
    assert diffray("retry-rejected", again, *flags)[0] == 0
    assert used == [
        Workers(
            patience=9,
            price_per_hour=3,
            gpus=1,
            labels={"zone": "a"},
            accelerator="H100",
            text_encoders=2,
            crashes=5,
        )
    ]
    assert json.loads((again / "report.json").read_text())["cost"]["price_per_hour"] == 3
    code, _, error = diffray("retry-rejected", again, "--job", "seed=3")
    assert (code, "--job seed: only workers and max_rejected may differ" in error) == (2, True)


def test_gc(out: Path) -> None:
    orphan = out / "data/part-00004.parquet"
    orphan.write_bytes(b"x")
    assert diffray("gc", out)[1] == "0 orphans deleted\n"
    os.utime(orphan, (time.time() - 2 * 86400,) * 2)
    assert diffray("gc", out, "--dry-run")[1] == "data/part-00004.parquet\n1 orphans found\n"
    assert diffray("gc", out)[1] == "data/part-00004.parquet\n1 orphans deleted\n"
    assert not orphan.exists()


@pytest.mark.parametrize("command", ["status", "verify", "retry-rejected", "gc"])
def test_an_output_without_a_job_exits_1(tmp_path: Path, command: str) -> None:
    code, _, error = diffray(command, tmp_path)
    assert (code, error) == (1, f"diffray: {tmp_path} holds no planned diffray job\n")


def test_storage_options() -> None:
    given = ["s3.region_name=eu-west-1", "s3://a.b/c.anon=true", "gs.token=anon"]
    assert storage_from(given, "http://x:9000", "lab", False) == {
        "s3": {"endpoint_url": "http://x:9000", "profile": "lab", "region_name": "eu-west-1"},
        "s3://a.b/c": {"anon": True},
        "gs": {"token": "anon"},
    }
    assert storage_from(None, None, None, True) == {"s3": {"anon": True}}
    assert storage_from(None, None, None, False) == {}
    code, _, error = diffray("status", "out", "--storage", "secret=sesame")
    assert (code, "expected PROTOCOL.OPTION=VALUE" in error, "sesame" in error) == (2, True, False)
