"""Inspection: what a checkpoint is and what is wrong with it, without raising."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffray.model.errors import CheckpointError
from diffray.model.weights.inspection import inspect_source

from ..checkpoints import edit, layout, write_folder, write_sparse


def test_a_published_file(tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "v1-5.safetensors", layout("sd15_ema_full.single"), {"title": "x"})
    found = inspect_source(str(file))
    assert (found.family, found.task, found.layout) == ("sd1", "text", "single")
    assert (found.prediction_type, found.prediction_decided_by) == ("epsilon", "default")
    assert found.ema
    assert found.problems == []
    assert {name: part.parameters for name, part in found.parts.items()} == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    }
    assert found.parts["unet"].dtypes == {"F32": 686}
    assert found.files == {"v1-5.safetensors": file.stat().st_size}
    assert found.metadata == {"title": "x"}
    assert json.loads(json.dumps(found.to_dict()))["parameters"] == found.parameters


def test_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sdxl")
    found = inspect_source(str(folder))
    assert (found.family, found.layout, found.problems) == ("sdxl", "folder", [])
    assert "unet/diffusion_pytorch_model.safetensors" in found.files
    assert set(found.parts) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert found.prediction_decided_by == "scheduler config"


def test_options_count(tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "xl.safetensors", layout("sdxl_base.single"))
    found = inspect_source(str(file), variant="turbo", prediction_type="v_prediction")
    assert (found.prediction_type, found.prediction_decided_by) == ("v_prediction", "option")
    assert found.defaults is not None
    assert found.defaults.steps == 1
    with pytest.raises(CheckpointError, match="unknown option"):
        inspect_source(str(file), varient="turbo")


def test_problems_are_listed_as_loading_would(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    edit(folder / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("conv_in.bias"))
    found = inspect_source(str(folder))
    assert found.problems == ["1 missing: unet: conv_in.bias"]
    assert found.family == "sd1"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + b"\xff" * 100])
def test_files_that_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    found = inspect_source(str(file))
    assert found.family is None
    assert len(found.problems) == 1
    assert str(file) in found.problems[0]


def test_other_kinds_and_nothing(tmp_path: Path) -> None:
    lora = write_sparse(tmp_path / "lora.safetensors", layout("lora_kohya_sdxl.single"))
    assert "a LoRA" in inspect_source(str(lora)).problems[0]
    assert inspect_source(str(lora)).files
    assert "no such" in inspect_source(str(tmp_path / "none")).problems[0]
