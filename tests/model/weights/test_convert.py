"""Conversion: there and back without loss, loadable by diffusers, and safely out of pickles."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffray.model.errors import CheckpointError, UnsafeCheckpoint
from diffray.model.weights.checkpoint import open_checkpoint
from diffray.model.weights.convert import convert
from diffray.model.weights.load import load_model

from ..checkpoints import text_model, unet_config, vae_config, write_folder

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file or folder."""
    files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    found = {
        f"{f.parent.name if path.is_dir() else ''}/{k}": v for f in files for k, v in load_file(f).items()
    }
    return {key.replace("/text_model.", "/"): value for key, value in found.items()}


def same(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "unclip", "x4", "sdxl", "refiner", "ssd", "koala"])
def test_folder_single_folder_loses_nothing(family: str, tmp_path: Path) -> None:
    first = write_folder(tmp_path / "first", family)
    single = convert(str(first), tmp_path / "single.safetensors")
    second = convert(str(single), tmp_path / "second", layout="folder")
    same(first, second)
    for name in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)):
        if (first / name).exists():
            assert (first / name).read_bytes() == (second / name).read_bytes()
    assert load_model(str(first)).config == load_model(str(single)).config == load_model(str(second)).config
    again = convert(str(second), tmp_path / "again.safetensors")
    same(single, again)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner", "ssd", "koala"])
def test_configs_that_are_made_here_load_in_diffusers(family: str, tmp_path: Path) -> None:
    """A single file without our metadata, so every config of the folder is generated."""
    first = write_folder(tmp_path / "first", family)
    single = convert(str(first), tmp_path / "single.safetensors")
    metadata = open_checkpoint(single).metadata
    # The sizes that a config must tell for tiny models: groups and heads are not in the shapes.
    keep = ("diffray.unet", "diffray.vae", "diffray.text", "diffray.tokenizer")
    stripped = {k: v for k, v in metadata.items() if k.startswith(keep)}
    save_file(load_file(single), single, metadata=stripped)
    folder = convert(str(single), tmp_path / "folder")
    plan = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, plan["_class_name"])
    optional = {} if "XL" in plan["_class_name"] else {"safety_checker": None}
    loaded = pipeline.from_pretrained(folder, **optional)
    reference = diffusers.UNet2DConditionModel.from_pretrained(first / "unet").state_dict()
    assert all(torch.equal(reference[k], v) for k, v in loaded.unet.state_dict().items())


@pytest.mark.parametrize("family", ["sd1", "sd2", "x4", "sdxl", "refiner", "unclip", "ssd", "koala", "lcm"])
def test_generated_unet_and_vae_configs_mean_the_same_network(family: str, tmp_path: Path) -> None:
    from diffray.model.weights.blueprint import recognise
    from diffray.model.weights.export import text_json, unet_json, vae_json

    folder = write_folder(tmp_path / "folder", family)
    config = recognise(open_checkpoint(folder)).config
    with torch.device("meta"):
        ours = diffusers.UNet2DConditionModel.from_config(unet_json(config))
        theirs = diffusers.UNet2DConditionModel(**unet_config(family))
        our_vae = diffusers.AutoencoderKL.from_config(vae_json(config.vae))
        their_vae = diffusers.AutoencoderKL(**vae_config(family))
    for a, b in ((ours, theirs), (our_vae, their_vae)):
        assert {k: v.shape for k, v in a.state_dict().items()} == {
            k: v.shape for k, v in b.state_dict().items()
        }
    heads = [m.heads for m in theirs.modules() if type(m).__name__ == "Attention"]
    assert [m.heads for m in ours.modules() if type(m).__name__ == "Attention"] == heads
    assert text_json(config.text[0])["vocab_size"] == text_model().config.vocab_size


def test_diffusers_reads_our_single_file(tmp_path: Path) -> None:
    """Its own converter is the second opinion on the names; the config comes from a local folder."""
    folder = write_folder(tmp_path / "folder", "sd1")
    single = convert(str(folder), tmp_path / "model.safetensors")
    for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
        got = kind.from_single_file(str(single), config=str(folder), subfolder=part, local_files_only=True)
        wanted = kind.from_pretrained(folder / part).state_dict()
        assert all(torch.equal(wanted[key], value) for key, value in got.state_dict().items())


def test_another_type(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sdxl")
    half = convert(str(folder), tmp_path / "half.safetensors", dtype="float16")
    floats = [t for k, t in load_file(half).items() if "position_ids" not in k]
    assert {t.dtype for t in floats} == {torch.float16}
    model = load_model(str(folder))
    for key, value in load_model(str(half)).unet.state_dict().items():
        assert torch.equal(value, model.unet.state_dict()[key].half().float())


def test_what_options_decide_is_written_down(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sdxl")
    for target in ("turbo.safetensors", "turbo"):
        out = convert(
            str(folder),
            tmp_path / target,
            variant="turbo",
            prediction_type="v_prediction",
            zero_terminal_snr=True,
        )
        config = load_model(str(out)).config
        assert config.noise.prediction_type == "v_prediction"
        assert config.noise.zero_terminal_snr
        assert (config.defaults.sampler, config.defaults.schedule) == ("euler_ancestral", "trailing")


def test_parts_that_are_not_written_become_null(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    out = convert(str(folder), tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_sd2_gets_an_identity_for_the_block_that_folders_lack(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd2")
    found = load_file(convert(str(folder), tmp_path / "model.safetensors"))
    block = "cond_stage_model.model.transformer.resblocks.3."
    assert not found[f"{block}attn.out_proj.weight"].any()
    assert not found[f"{block}mlp.c_proj.weight"].any()
    assert found[f"{block}ln_1.weight"].all()
    assert torch.equal(found["cond_stage_model.model.text_projection"], torch.eye(32))


def test_the_openai_vocabulary_is_not_copied_into_headers(tmp_path: Path) -> None:
    single = convert(str(write_folder(tmp_path / "folder", "sd1")), tmp_path / "model.safetensors")
    assert "diffray.tokenizer/vocab.json" in open_checkpoint(single).metadata  # its own is
    assert open_checkpoint(single).metadata["modelspec.architecture"] == "stable-diffusion-v1"


def test_header_files_cannot_name_other_paths(tmp_path: Path) -> None:
    single = convert(str(write_folder(tmp_path / "folder", "sd1")), tmp_path / "model.safetensors")
    metadata = open_checkpoint(single).metadata | {
        "diffray.../../evil.json": "{}",
        "diffray./tmp/evil.json": "{}",
    }
    save_file(load_file(single), single, metadata=metadata)
    assert all("evil" not in name for name in open_checkpoint(single).texts)
    convert(str(single), tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil.json"))


def test_an_existing_target_stays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    target = tmp_path / "target.safetensors"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(str(folder), target)
    assert target.read_text() == "mine"


def test_a_bad_source_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    broken = load_file(file)
    broken["conv_in.bias"][0] = float("nan")
    save_file(broken, file)
    with pytest.raises(CheckpointError, match="1 not finite"):
        convert(str(folder), tmp_path / "out" / "x.safetensors")
    assert not (tmp_path / "out").exists()


# Pickles ---------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it would create the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def with_metadata(single: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return load_file(single), open_checkpoint(single).metadata


@pytest.mark.slow
def test_a_pickled_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    wanted = load_model(str(folder)).config
    for part, new in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), folder / part / f"{new}.bin")
        file.unlink()
    with pytest.raises(UnsafeCheckpoint):
        load_model(str(folder))
    out = convert(str(folder), tmp_path / "out")
    assert load_model(str(out)).config == wanted
    assert not list(out.rglob("*.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickled_file(nested: bool, tmp_path: Path) -> None:
    """The tiny model's tokenizer and groups are only in its header, which a pickle does not have, so the way
    out is followed up to the tensors."""
    from diffray.model.weights.convert import unpickle

    found, _ = with_metadata(
        convert(str(write_folder(tmp_path / "folder", "sd1")), tmp_path / "a.safetensors")
    )
    source, target = tmp_path / "model.ckpt", tmp_path / "b.safetensors"
    torch.save({"state_dict": found, "global_step": 7} if nested else found, source)
    unpickle(source, target)
    assert load_file(target).keys() == found.keys()
    with pytest.raises(CheckpointError, match=r"channels|tokenizer"):
        convert(str(source), tmp_path / "c.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch", "pickle", "beside", "garbage", "truncated", "renamed"])
def test_payloads_are_refused_and_never_run(how: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / ("model.safetensors" if how == "renamed" else "model.ckpt")
    if how == "pickle":
        file.write_bytes(pickle.dumps(Payload(canary)))
    elif how == "garbage":
        file.write_bytes(pickle.dumps(Payload(canary)) + b"\x00garbage" * 50)
    else:
        tensors = {"w": torch.zeros(2)}
        torch.save(
            {"state_dict": tensors, "x": Payload(canary)} if how == "beside" else Payload(canary), file
        )
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError) as caught:
        convert(str(file), tmp_path / "out.safetensors")
    assert isinstance(caught.value, UnsafeCheckpoint) or how == "truncated"
    assert "weights_only" not in str(caught.value)  # torch's advice on how to run it anyway
    assert not canary.exists()
    assert not (tmp_path / "out.safetensors").exists()
