"""Flags of checks and reports, and what they set in a job."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.cli.command import STORAGE, job_values
from diffray.pipelines import JobConfig


def test_flags_set_the_keys_of_a_job(tmp_path: Path) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("fox\n")
    given = {
        **dict.fromkeys(STORAGE),
        "block": str(terms),
        "measures": True,
        "near_duplicates": 3,
        "blank": "keep",
        "safety": "s",
        "flagged": "reject",
        "gallery": 0,
        "license": "mit",
        "price_per_hour": 2.0,
        "images": "files",
        "metadata": "jsonl",
    }
    config = JobConfig.checked({"input": "a", "output": "b", **job_values(given)})
    assert config.checks.block == ("fox",)
    assert (config.checks.measures, config.checks.near_duplicates, config.checks.blank) == (True, 3, "keep")
    assert (config.checks.safety, config.checks.flagged) == ("s", "reject")
    assert (config.gallery, config.license, config.workers.price_per_hour) == (0, "mit", 2.0)
    assert (config.encoding.layout, config.encoding.metadata) == ("files", "jsonl")


@pytest.mark.parametrize(
    "flags", [["--block", "/no/such/file"], ["--near-duplicates", "99"], ["--flagged", "reject"]]
)
def test_flags_that_make_no_sense_exit_2(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "in.csv").write_text("prompt\nx\n")
    command = ["generate", str(tmp_path / "in.csv"), str(tmp_path / "out"), *flags]
    assert CliRunner().invoke(app, command).exit_code == 2
    assert not (tmp_path / "out").exists()
