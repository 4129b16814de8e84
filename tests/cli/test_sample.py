"""`diffray sample`: one picture, with how it was made inside."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.model.encoding import SYNTHETIC, read_provenance


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    result = CliRunner().invoke(
        app, ["sample", "a red circle", "-o", str(path), "--steps", "2", "--seed", "9"]
    )
    assert result.exit_code == 0, result.output
    found = read_provenance(path.read_bytes())
    assert found.parameters is not None
    assert found.infotext is not None
    assert (found.parameters["seed"], found.parameters["model"]) == (9, "embedded")
    assert "Model: embedded" in found.infotext
    assert found.source_type == SYNTHETIC


def test_a_name_that_is_no_picture_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["sample", "x", "-o", str(tmp_path / "x.gif"), "--model", "/no/such/model"]
    )
    assert result.exit_code == 2
    assert ".webp" in result.output
