"""Names of published adapter files: every tensor means one module."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffray.model.adapters.adapter import Adapter, fitting_adapters
from diffray.model.adapters.names import module_names, spelled
from diffray.model.config import TextConfig
from diffray.model.errors import CheckpointError
from diffray.model.weights.blueprint import Blueprint, recognise
from diffray.model.weights.checkpoint import open_checkpoint

from ..checkpoints import LAYOUTS, layout, write_sparse

MODELS = {"sd15": "sd15.single", "sd21": "sd21_v.single", "sdxl": "sdxl_base.single"}
FILES = sorted(p.name.removesuffix(".json.gz") for p in LAYOUTS.glob("lora_*.json.gz"))
KNOWN = [name for name in FILES if any(model in name for model in MODELS)]


@pytest.fixture(scope="module")
def blueprints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blueprint]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: recognise(open_checkpoint(write_sparse(folder / f"{name}.safetensors", layout(file))))
        for name, file in MODELS.items()
    }


def fitted(name: str, blueprint: Blueprint, folder: Path) -> Adapter:
    file = write_sparse(folder / f"{name}.safetensors", layout(name))
    return fitting_adapters({"own": str(file)}, blueprint)["own"]


def model_of(name: str) -> str:
    return next(model for model in MODELS if model in name)


@pytest.mark.parametrize("name", KNOWN)
def test_every_tensor_of_a_published_file_belongs_to_one_module(
    name: str, blueprints: dict[str, Blueprint], tmp_path: Path
) -> None:
    adapter = fitted(name, blueprints[model_of(name)], tmp_path)
    used = [key for change in adapter.changes.values() for key in change.keys.values()]
    assert sorted(used) == sorted(layout(name))
    # As many modules as the file has, so no two of its names mean the same one.
    assert len(adapter.changes) == len({spelled(key)[0] for key in layout(name) if spelled(key)})  # type: ignore[index]
    assert (adapter.info.kinds, adapter.info.rank) == (("LoRA",), 16)


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_of_another_family_is_refused_by_name(
    name: str, blueprints: dict[str, Blueprint], tmp_path: Path
) -> None:
    families = {
        "sd15": "Stable Diffusion 1",
        "sd21": "Stable Diffusion 2",
        "sdxl": "SDXL",
        "sd3": "Diffusion 3",
    }
    own = next(family for part, family in families.items() if part in name)
    for model, blueprint in blueprints.items():
        if model not in name:
            with pytest.raises(CheckpointError, match=f"an adapter for .*{own}.*, this model is sd"):
                fitted(name, blueprint, tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_no_name_means_two_modules(model: str, blueprints: dict[str, Blueprint]) -> None:
    """Underscores for dots could make two names one."""
    parts = blueprints[model].parts
    names = module_names(parts)
    modules = {
        (part.name, key.rpartition(".")[0])
        for part in parts.values()
        if part.name == "unet" or isinstance(part.config, TextConfig)
        for key in part.shapes
    }
    assert set(names.values()) == modules
    for style in ("lora_unet_down", "lora_te", "unet.", "lora_unet_input"):
        own = [place for name, place in names.items() if name.startswith(style)]
        assert len(own) >= len(set(own)) > 0
    kohya = [place for name, place in names.items() if name.startswith(("lora_te1_", "lora_te2_"))]
    assert len(kohya) == len(set(kohya))
    folder = [p for name, p in names.items() if name == f"lora_unet_{p.module.replace('.', '_')}"]
    assert len(folder) == len({p for p in modules if p[0] == "unet"})


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("lora_unet_conv_in.lora_down.weight", ("lora_unet_conv_in", "down")),
        (
            "unet.mid_block.attentions.0.proj_in.lora_A.default_0.weight",
            ("unet.mid_block.attentions.0.proj_in", "down"),
        ),
        ("base_model.model.conv_out.lora_B.weight", ("conv_out", "up")),
        ("unet.x.attn1.processor.to_out_lora.up.weight", ("unet.x.attn1.to_out.0", "up")),
        ("text_encoder.x.self_attn.to_out_lora.up.weight", ("text_encoder.x.self_attn.out_proj", "up")),
        ("text_encoder.x.q_proj.lora_linear_layer.down.weight", ("text_encoder.x.q_proj", "down")),
        ("unet.x.to_q.lora_magnitude_vector.weight", ("unet.x.to_q", "magnitude")),
        ("lora_unet_x.dora_scale", ("lora_unet_x", "dora_scale")),
        ("lora_unet_x.lokr_w2_a", ("lora_unet_x", "lokr_w2_a")),
        ("lora_unet_x.b_norm", ("lora_unet_x", "diff_b")),
        ("lora_unet_x.oft_blocks", None),
        ("lora_unet_x.lora_down.bias", None),
        ("unet.x.to_q.weight", None),
    ],
)
def test_spellings(key: str, wanted: tuple[str, str] | None) -> None:
    assert spelled(key) == wanted
