"""Adapter files that are refused, and what is read of those that are not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffray.model import Engine, ImageRequest, UnsafeCheckpoint, load_model, model_config
from diffray.model.adapters.adapter import adapter_checksums
from diffray.model.errors import CheckpointError

from .. import oracle
from . import files

NAME = "lora_unet_mid_block_attentions_0_proj_in"
ASK = ImageRequest(steps=1, width=oracle.SIDE, height=oracle.SIDE, adapters="own")


def tensors() -> dict[str, Tensor]:
    return files.kohya_file("sd1", files.factors("sd1"))


def fits(file: Any, kind: str = "sd1") -> None:
    model_config(str(oracle.folder(kind)), adapters={"own": str(file)})


def changed(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    own = tensors()
    change(own)
    return files.save(path / "own.safetensors", own)


CASES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a module that is not there": (
        lambda t: t.update({"lora_unet_nowhere.lora_up.weight": torch.ones(1)}),
        "1 unexpected: lora_unet_nowhere.lora_up.weight",
    ),
    "another kind of factor": (
        lambda t: t.update({f"{NAME}.oft_blocks": torch.ones(1)}),
        f"{NAME}.oft_blocks",
    ),
    "half a pair": (lambda t: t.pop(f"{NAME}.lora_up.weight"), f"{NAME}.*no whole LoRA"),
    "rank 0": (
        lambda t: t.update(
            {
                f"{NAME}.lora_down.weight": torch.ones(0, 64, 1, 1),
                f"{NAME}.lora_up.weight": torch.ones(64, 0, 1, 1),
            }
        ),
        "rank of at least 1",
    ),
    "another width": (
        lambda t: t.update({f"{NAME}.lora_down.weight": torch.ones(4, 65, 1, 1)}),
        r"down \[4, 65, 1, 1\].* make \[64, 65, 1, 1\], wanted \[64, 64, 1, 1\]",
    ),
    "integers": (
        lambda t: t.update({f"{NAME}.lora_up.weight": torch.ones(64, 4, dtype=torch.int8)}),
        "type I8",
    ),
    "twice the same": (
        lambda t: t.update({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 64, 1, 1)}),
        "1 unexpected: ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_does_not_fit_is_refused_before_a_value_is_read(case: str, tmp_path: Path) -> None:
    change, message = CASES[case]
    file = changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"own.safetensors: (.|\n)*{message}"):
        fits(file)
    with pytest.raises(CheckpointError):
        load_model(str(oracle.folder("sd1")), device="cpu", adapters={"own": file})


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this is a ControlNet; supported are"):
        fits(files.save(tmp_path / "c.safetensors", {"control_model.time_embed.0.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="its first tensors are a"):
        fits(files.save(tmp_path / "a.safetensors", {"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="allowed is a safetensors file"):
        fits(tmp_path)
    (tmp_path / "own.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UnsafeCheckpoint, match="pickle"):
        fits(tmp_path / "own.pt")
    whole = Path(files.save(tmp_path / "own.safetensors", tensors())).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="incomplete"):
        fits(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["../x", "/abs", "a\0b", "x" * 300, ".x", "a,b", ""])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    file = files.save(tmp_path / "own.safetensors", tensors())
    with pytest.raises(CheckpointError, match="a name is"):
        model_config(str(oracle.folder("sd1")), adapters={name: file})


@pytest.mark.parametrize(
    ("key", "value"),
    [(f"{NAME}.lora_up.weight", "nan"), (f"{NAME}.lora_down.weight", "inf"), (f"{NAME}.alpha", "nan")],
)
def test_values_that_are_not_finite_cost_the_image_alone(key: str, value: str, tmp_path: Path) -> None:
    good = files.save(tmp_path / "good.safetensors", tensors())

    def spoil(own: dict[str, Tensor]) -> None:
        own[key] = own[key].clone()
        own[key].view(-1)[0] = float(value)

    model = load_model(
        str(oracle.folder("sd1")), device="cpu", adapters={"own": changed(tmp_path, spoil), "good": good}
    )
    engine = Engine(model, batch_size=2)
    broken, plain = (
        engine.submit(ASK),
        engine.submit(ImageRequest(steps=2, width=32, height=32, adapters="good")),
    )
    while engine.step():
        pass
    with pytest.raises(CheckpointError, match=f"1 not finite: {key}"):
        broken.future.result(0)
    assert plain.future.result(0).image is not None


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    file = files.save(tmp_path / "own.safetensors", tensors())
    model = load_model(str(oracle.folder("sd1")), device="cpu", adapters={"own": file})
    files.save(tmp_path / "new.safetensors", {k: 2 * v for k, v in tensors().items()})
    os.replace(tmp_path / "new.safetensors", file)
    with pytest.raises(CheckpointError, match="changed on disk"):
        Engine(model).generate([ASK])
    with pytest.raises(CheckpointError, match="changed on disk"):
        model.adapters.checksums()


def test_checksums_and_info(tmp_path: Path) -> None:
    file = files.save(tmp_path / "own.safetensors", tensors(), {"ss_output_name": "mine"})
    wanted = {"own": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    assert adapter_checksums({"own": file}) == wanted
    model = load_model(str(oracle.folder("sd1")), device="cpu", adapters={"own": file})
    assert (model.adapters.names, model.adapters.checksums(), model.adapters.bytes) == (("own",), wanted, 0)
    info = model.adapters.info("own")
    assert (info.kinds, info.rank, info.parts) == (("LoRA",), files.RANK, ("text_encoder", "unet"))
    assert (info.bytes, info.metadata["ss_output_name"]) == (Path(file).stat().st_size, "mine")


def test_alpha_in_the_header_is_that_of_peft(tmp_path: Path) -> None:
    """As diffusers writes and reads it: per part, with exceptions by module."""
    made = files.factors("sd1")
    config = {
        "unet.r": files.RANK,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"down_blocks.0.attentions.0.proj_in": 1},
        "unet.target_modules": sorted({module for part, module in made if part == "unet"}),
        "text_encoder.r": files.RANK,
        "text_encoder.lora_alpha": 2,
        "text_encoder.target_modules": sorted(
            {module.removeprefix("text_model.") for part, module in made if part != "unet"}
        ),
    }
    metadata = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    file = files.save(tmp_path / "own.safetensors", files.peft_file("sd1", made), metadata)
    model = load_model(str(oracle.folder("sd1")), device="cpu", adapters={"own": file})
    asked: dict[str, Any] = {"guidance_scale": 3.0, "width": 32, "height": 32}
    got = oracle.latents(model, steps=1, adapters="own", **asked)
    wanted = oracle.theirs(files.pipeline("sd1", (file, 1.0)), num_inference_steps=1, **asked)
    assert oracle.relative(got, wanted) < oracle.TOLERANCE
