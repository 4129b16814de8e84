"""`diffray sample`: one picture, with how it was made inside."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.model import load_model
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


def write_adapter(path: Path) -> Path:
    """A LoRA of one layer of the embedded model."""
    name = "mid_block.attentions.0.proj_in"
    out, width = load_model().unet.get_parameter(f"{name}.weight").shape[:2]
    factors = {
        f"unet.{name}.lora_A.weight": torch.ones(1, width),
        f"unet.{name}.lora_B.weight": torch.ones(out, 1),
    }
    save_file(factors, path)
    return path


def test_adapters_by_file_and_by_name(tmp_path: Path) -> None:
    file, pictures = write_adapter(tmp_path / "my style.safetensors"), {}
    for flags in ([], ["--adapter", f"{file}:0.5"], ["--adapter", f"other={file}"]):
        path = tmp_path / "x.png"
        result = CliRunner().invoke(app, ["sample", "a red circle", "-o", str(path), "--steps", "1", *flags])
        assert result.exit_code == 0, result.output
        found = read_provenance(path.read_bytes())
        assert found.parameters is not None
        chosen = found.parameters.get("adapters", [])
        pictures[tuple((one["name"], one["weight"]) for one in chosen)] = Image.open(path).tobytes()
        if chosen:
            checksum = hashlib.sha256(file.read_bytes()).hexdigest()
            assert found.parameters["adapter_checksums"] == {chosen[0]["name"]: checksum}
            assert f"{chosen[0]['name']}: {checksum[:10]}" in (found.infotext or "")
    assert set(pictures) == {(), (("my style", 0.5),), (("other", 1.0),)}
    assert len(set(pictures.values())) == 3


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    for value, shown in (
        (str(tmp_path / "x.safetensors"), "no such file"),
        ("a=x:y", "x:y"),
        ("b.x:11", "b.x"),
    ):
        result = CliRunner().invoke(app, ["sample", "x", "-o", str(tmp_path / "x.png"), "--adapter", value])
        assert result.exit_code != 0
        assert shown in result.output
    twice = [flag for source in ("a.safetensors", "b/a.safetensors") for flag in ("--adapter", source)]
    assert "given twice" in CliRunner().invoke(app, ["sample", "x", *twice]).output


def test_a_name_that_is_no_picture_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["sample", "x", "-o", str(tmp_path / "x.gif"), "--model", "/no/such/model"]
    )
    assert result.exit_code == 2
    assert ".webp" in result.output
