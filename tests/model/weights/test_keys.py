"""Key tables against the published layouts, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffray.model.config import TextConfig
from diffray.model.networks.unet import UNet
from diffray.model.networks.vae import Autoencoder
from diffray.model.weights.blueprint import Blueprint, recognise
from diffray.model.weights.checkpoint import open_checkpoint
from diffray.model.weights.convert import single_place, single_rules, unused_tensors
from diffray.model.weights.detect import detect_unet, detect_vae
from diffray.model.weights.keys import Rule, folder_shapes, packing, unet_modules, vae_folder_rules

from ..checkpoints import LAYOUTS, layout, write_sparse

SINGLES = sorted(
    name
    for name in (p.name.removesuffix(".json.gz") for p in LAYOUTS.glob("*.single.json.gz"))
    if name.startswith(("sd15", "sd2", "sdxl", "instruct", "x4"))
)
UNETS = sorted(p.name.removesuffix(".json.gz") for p in LAYOUTS.glob("*.unet.diffusers.json.gz"))
BUFFERS = ("alphas", "betas", "posterior", "sqrt_", "log_one", "low_scale_model.")


def blueprint(tmp_path: Path, name: str) -> Blueprint:
    return recognise(open_checkpoint(write_sparse(tmp_path / f"{name}.safetensors", layout(name))))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in layout(name).items()}


@pytest.mark.parametrize("name", SINGLES)
def test_every_key_of_a_published_file_is_used_or_ignored_by_name(name: str, tmp_path: Path) -> None:
    plan = blueprint(tmp_path, name)
    assert plan.problems().lines() == []
    for part in plan.parts.values():  # and every folder tensor is filled exactly once
        filled = [key for rule in part.rules for key in rule.folder]
        assert sorted(filled) == sorted(part.shapes)


@pytest.mark.parametrize("name", UNETS)
def test_single_file_names_lead_to_the_diffusers_names(name: str, tmp_path: Path) -> None:
    single = {"sd21": "sd21_v"}.get(name.split(".")[0], name.split(".")[0])
    part = blueprint(tmp_path, f"{single}.single").parts["unet"]
    assert part.shapes == shapes(name)


@pytest.mark.parametrize(
    ("single", "part", "name"),
    [
        ("sd15", "vae", "sd_sdxl.vae"),
        ("x4_upscaler", "vae", "x4_upscaler.vae"),
        ("sd15", "text_encoder", "sd15_sdxl.text_encoder"),
        ("sd21_v", "text_encoder", "sd2.text_encoder"),
        ("sdxl_base", "text_encoder_2", "sdxl.text_encoder_2"),
        ("sdxl_refiner", "text_encoder_2", "sdxl.text_encoder_2"),
    ],
)
def test_other_parts_lead_to_the_folder_names(single: str, part: str, name: str, tmp_path: Path) -> None:
    wanted = shapes(f"{name}.diffusers")
    wanted.pop("text_model.embeddings.position_ids", None)
    assert blueprint(tmp_path, f"{single}.single").parts[part].shapes == wanted


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_folder_is_filled_completely(name: str) -> None:
    found = shapes(name)
    config = detect_unet(found, "folder")
    with torch.device("meta"):
        network = UNet(config)
    assert folder_shapes(network.state_dict()) == found
    assert len(unet_modules(config)) == len(set(unet_modules(config)))


def test_legacy_attention_names_of_a_vae_folder() -> None:
    found = shapes("sd15_sd2_legacy_attention_names.vae.diffusers")
    config = detect_vae(found, "folder", scale=1.0, force_upcast=False)
    with torch.device("meta"):
        wanted = folder_shapes(Autoencoder(config).state_dict())
    rules = vae_folder_rules(wanted, found)
    assert sorted(rule.file for rule in rules) == sorted(found)
    assert all(found[rule.file] == wanted[rule.folder[0]] for rule in rules)


@pytest.mark.parametrize(
    "name",
    ["sd15", "sd15_inpainting", "instruct_pix2pix", "sd21_v", "sdxl_base", "sdxl_refiner", "x4_upscaler"],
)
def test_written_single_files_have_exactly_the_published_names_and_shapes(name: str, tmp_path: Path) -> None:
    plan = blueprint(tmp_path, f"{name}.single")
    made: dict[str, tuple[int, ...]] = {}
    for part in plan.parts.values():
        meta = {key: torch.empty(shape, device="meta") for key, shape in part.shapes.items()}
        packed = {
            rule.file: rule.pack(tuple(meta[key] for key in rule.folder)) for rule in single_rules(plan, part)
        }
        if isinstance(part.config, TextConfig):
            prefix, style = single_place(plan, part.name)
            like = next(iter(meta.values()))
            packed |= unused_tensors(part.config, prefix, style, like, packed)
        made |= {key: tuple(tensor.shape) for key, tensor in packed.items()}
    wanted = {key: s for key, s in shapes(f"{name}.single").items() if not key.startswith(BUFFERS)}
    assert made == wanted


@pytest.mark.parametrize(
    ("form", "count", "shape"),
    [
        ("same", 1, (6, 4)),
        ("conv1x1", 1, (6, 4)),
        ("transpose", 1, (6, 4)),
        ("thirds", 3, (6, 4)),
        ("thirds", 3, (6,)),
    ],
)
def test_a_rule_reads_what_it_writes(form: str, count: int, shape: tuple[int, ...]) -> None:
    rule = Rule("file", tuple("abc"[:count]), form)  # type: ignore[arg-type]
    tensors = tuple(torch.randn(shape) for _ in range(count))
    packed = rule.pack(tensors)
    assert rule.fits(tuple(packed.shape), shape)
    assert not rule.fits((*packed.shape, 2), shape)
    for got, wanted in zip(rule.unpack(packed), tensors, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_packing_keeps_order() -> None:
    assert packing("x.attn1.to_qkv.weight") == tuple(f"x.attn1.to_{c}.weight" for c in "qkv")
    assert packing("x.attn2.to_kv.weight") == ("x.attn2.to_k.weight", "x.attn2.to_v.weight")
    assert packing("conv_in.bias") == ("conv_in.bias",)


def test_fixtures_are_plain_json() -> None:
    assert json.dumps(layout("sd15.single"))
