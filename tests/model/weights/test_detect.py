"""What a checkpoint is, from names and shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers

from diffray.model import ImageRequest, InvalidRequest
from diffray.model.config import UNetConfig
from diffray.model.errors import CheckpointError
from diffray.model.networks.unet import UNet
from diffray.model.weights.blueprint import Blueprint, recognise
from diffray.model.weights.checkpoint import open_checkpoint
from diffray.model.weights.detect import detect_unet, detect_vae
from diffray.model.weights.families import FAMILIES, Options
from diffray.model.weights.keys import folder_shapes, renamed, unet_modules
from tests.model.oracle import TWINS

from ..checkpoints import Layout, layout, unet_config, vae_config, write_sparse

XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PRUNED: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [[0, 0], [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
    },
    "Vega": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [[0, 0], [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
    },
    "KOALA-700M": {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    "KOALA-1B": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
}


def recognised(
    tmp_path: Path, tensors: Layout, metadata: dict[str, str] | None = None, **options: Any
) -> Blueprint:
    file = write_sparse(tmp_path / "model.safetensors", tensors, metadata)
    return recognise(open_checkpoint(file), Options(**options))


def diffusers_shapes(**config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def single_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        found = folder_shapes(UNet(config).state_dict())
    return {rule.file: found[rule.folder[0]] for rule in renamed(unet_modules(config), found, "")}


@pytest.mark.parametrize(
    ("name", "family", "task"),
    [
        ("sd15", "sd1", "text"),
        ("sd15_ema_full", "sd1", "text"),
        ("sd15_inpainting", "sd1", "inpaint"),
        ("instruct_pix2pix", "sd1", "edit"),
        ("sd21_base", "sd2", "text"),
        ("sd21_unclip_l", "sd2", "text"),
        ("sd21_unclip_h", "sd2", "text"),
        ("sd2_inpainting", "sd2", "inpaint"),
        ("sd2_depth", "sd2", "depth"),
        ("x4_upscaler", "x4-upscaler", "upscale"),
        ("sdxl_base", "sdxl", "text"),
        ("sdxl_inpainting", "sdxl", "inpaint"),
        ("sdxl_refiner", "sdxl-refiner", "text"),
    ],
)
def test_published_files(name: str, family: str, task: str, tmp_path: Path) -> None:
    config = recognised(tmp_path, layout(f"{name}.single")).config
    assert (config.family, config.task) == (family, task)


def test_published_dimensions(tmp_path: Path) -> None:
    sd1 = recognised(tmp_path, layout("sd15.single")).config
    assert sd1.unet.channels == (320, 640, 1280, 1280)
    assert sd1.unet.heads == (8, 8, 8, 8)
    assert sd1.unet.down == ((1, 1), (1, 1), (1, 1), (0, 0))
    assert sd1.unet.up == ((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0))
    assert (sd1.unet.mid_depth, sd1.unet.context_dim, sd1.unet.linear_projection) == (1, 768, False)
    assert (sd1.vae.channels, sd1.vae.resnets, sd1.vae.scale, sd1.vae.factor) == (
        (128, 256, 512, 512),
        2,
        0.18215,
        8,
    )
    text = sd1.text[0]
    assert (text.hidden, text.layers, text.heads, text.activation) == (768, 12, 12, "quick_gelu")
    assert (text.pad_id, text.bos_id, text.eos_id) == (49407, 49406, 49407)
    assert (sd1.defaults.width, sd1.defaults.sampler, sd1.defaults.steps) == (512, "pndm", 50)

    sd2 = recognised(tmp_path, layout("sd21_v.single"), prediction_type="v_prediction").config
    assert sd2.unet.heads == (5, 10, 20, 20)
    assert (sd2.text[0].layers, sd2.text[0].pad_id, sd2.text[0].activation) == (23, 0, "gelu")
    assert (sd2.defaults.width, sd2.text[0].projection_dim) == (768, None)

    xl = recognised(tmp_path, layout("sdxl_base.single")).config
    assert xl.unet.heads == (5, 10, 20)
    assert xl.unet.down == ((0, 0), (2, 2), (10, 10))
    assert (xl.unet.added_dim, xl.unet.added_kind, xl.vae.scale) == (2816, "text_time", 0.13025)
    assert [(t.hidden, t.layers, t.layer, t.final_norm, t.pad_id, t.projection_dim) for t in xl.text] == [
        (768, 12, 1, False, 49407, None),
        (1280, 32, 1, False, 0, 1280),
    ]
    assert xl.zero_empty_negative
    assert xl.defaults.width == 1024

    x4 = recognised(tmp_path, layout("x4_upscaler.single")).config
    assert (x4.unet.class_count, x4.unet.heads, x4.vae.factor) == (1000, (8, 8, 8, 8), 4)
    assert x4.unet.cross_attention_only == (False, True, True, False)  # no attention on the first level
    assert (x4.noise.beta_start, x4.noise.beta_end, x4.noise.prediction_type) == (
        0.0001,
        0.02,
        "v_prediction",
    )

    refiner = recognised(tmp_path, layout("sdxl_refiner.single")).config
    assert refiner.unet.heads == (6, 12, 24, 24)
    assert refiner.aesthetic_score
    assert not refiner.zero_empty_negative


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd3_medium.single", "Stable Diffusion 3"),
        ("sd35_large.single", "Stable Diffusion 3"),
        ("sd3_medium.transformer.diffusers", "Stable Diffusion 3"),
        ("controlnet_sd15.single", "ControlNet"),
        ("controlnet_sdxl.diffusers", "ControlNet"),
        ("lora_kohya_sdxl.single", "LoRA"),
        ("lora_peft_sd15.diffusers", "LoRA"),
        ("lora_old_attnproc_sd15.diffusers", "LoRA"),
        ("lora_down_up_sd15.diffusers", "LoRA"),
        ("ip_adapter_sd15.single", "IP-Adapter"),
        ("ip_adapter_plus_sdxl_vit_h.single", "IP-Adapter"),
        ("ip_adapter_vit_h.image_encoder.diffusers", "CLIP image encoder"),
        ("t2i_adapter_sd15_light_color.single", "T2I-Adapter"),
        ("t2i_adapter_sdxl.diffusers", "T2I-Adapter"),
        ("taesd_taesdxl.diffusers", "TAESD"),
        ("taesd_taesdxl_decoder.single", "TAESD"),
        ("sd15.safety_checker.diffusers", "safety checker"),
        ("sd15.unet.diffusers", "a UNet alone"),
        ("sd_sdxl.vae.diffusers", "an autoencoder alone"),
        ("sd2.text_encoder.diffusers", "a text encoder alone"),
    ],
)
def test_other_files_are_named_and_refused(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=kind):
        recognised(tmp_path, layout(name))


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_xl(name: str) -> None:
    shapes = diffusers_shapes(**(XL | PRUNED[name]))
    config = detect_unet(shapes, "folder")
    with torch.device("meta"):
        assert folder_shapes(UNet(config).state_dict()) == shapes
    assert detect_unet(single_shapes(config), "single", xl=True) == config
    assert (config.mid_resnets, config.mid_depth) == {
        "SSD-1B": (1, None),
        "Vega": (1, None),
        "KOALA-700M": (0, None),
        "KOALA-1B": (2, 6),
    }[name]


@pytest.mark.parametrize("family", ["sd1", "sd2", "x4", "sdxl", "refiner", "unclip", "ssd", "koala", "lcm"])
def test_tiny_models_of_any_dimensions(family: str) -> None:
    config = unet_config(family)
    found = detect_unet(diffusers_shapes(**config), "folder", config)
    assert found.channels == (32, 64, 64)
    assert found.norm_groups == 16
    again = detect_unet(single_shapes(found), "single", config, xl=found.added_kind == "text_time")
    assert again == found


def test_a_small_model_without_any_config() -> None:
    """Attention on levels 1 and 2 only, one resnet a level: the shape of the embedded model."""
    cross = "CrossAttnDownBlock2D"
    shapes = diffusers_shapes(
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", cross, cross),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
    )
    config = detect_unet(shapes, "folder")
    assert config.down == ((0,), (1,), (1,))
    assert config.up == ((0, 0), (1, 1), (1, 1))
    assert (config.heads, config.context_dim) == ((8, 8, 8), 128)
    assert detect_unet(single_shapes(config), "single") == config
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**vae_config("sd1"))
    found = detect_vae(
        {k: tuple(v.shape) for k, v in vae.state_dict().items()},
        "folder",
        vae_config("sd1"),
        scale=1.0,
        force_upcast=False,
    )
    assert (found.channels, found.resnets, found.factor, found.norm_groups) == ((16, 16, 32), 1, 4, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", 9),
        ("block_out_channels", [32, 64, 128]),
        ("cross_attention_dim", 768),
        ("use_linear_projection", True),
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("addition_embed_type", "image"),
        ("attention_head_dim", [8, 8]),
        ("attention_head_dim", 7),
        ("norm_num_groups", 48),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(field: str, value: Any) -> None:
    config = unet_config("sd1")
    with pytest.raises(
        CheckpointError,
        match=r"in_channels|block_out|cross_att|linear|act_fn|scale_shift|time_emb|addition|head|divide",
    ):
        detect_unet(diffusers_shapes(**config), "folder", config | {field: value})


# Prediction type -------------------------------------------------------------------------------------------


def test_prediction_type_is_decided_in_order(tmp_path: Path) -> None:
    xl = layout("sdxl_base.single")
    marked = xl | {"v_pred": ((0,), "F32"), "ztsnr": ((0,), "F32")}
    spec = {"modelspec.prediction_type": "epsilon"}
    folder = spec | {"diffray.scheduler/scheduler_config.json": '{"prediction_type": "sample"}'}

    def decided(
        tensors: Layout, metadata: dict[str, str] | None = None, **options: Any
    ) -> tuple[str, str, bool]:
        config = recognised(tmp_path, tensors, metadata, **options).config
        return config.noise.prediction_type, config.prediction_decided_by, config.noise.zero_terminal_snr

    assert decided(xl) == ("epsilon", "default", False)
    assert decided(marked) == ("v_prediction", "marker key", True)
    assert decided(marked, spec) == ("epsilon", "header", True)
    assert decided(marked, folder) == ("sample", "scheduler config", True)
    assert decided(marked, folder, prediction_type="v_prediction", zero_terminal_snr=False) == (
        "v_prediction",
        "option",
        False,
    )


@pytest.mark.parametrize(("spread", "wanted"), [(0.05, "epsilon"), (0.15, "v_prediction")])
def test_sd2_is_told_by_the_spread_of_one_bias(spread: float, wanted: str, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "sd2.safetensors", layout("sd21_v.single"))
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    start = _offset(file, key)
    bias = torch.randn(320, generator=torch.Generator().manual_seed(0))
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write((bias / bias.std() * spread).numpy().tobytes())
    config = recognise(open_checkpoint(file)).config
    assert (config.noise.prediction_type, config.prediction_decided_by) == (wanted, "statistics")


def _offset(file: Path, key: str) -> int:
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return 8 + length + int(json.loads(handle.read(length))[key]["data_offsets"][0])


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_edm_checkpoints_are_refused(marker: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="EDM"):
        recognised(tmp_path, layout("sdxl_base.single") | {marker: ((4,), "F32")})


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.out.2.scale_weight", "model.diffusion_model.scaled_fp8"]
)
def test_scaled_fp8_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fp8-scaled"):
        recognised(tmp_path, layout("sd15.single") | {key: ((), "F32")})


def test_plain_fp8_is_recognised(tmp_path: Path) -> None:
    tensors = {
        k: (s, "F8_E4M3" if d in ("F16", "F32") else d) for k, (s, d) in layout("sdxl_base.single").items()
    }
    assert recognised(tmp_path, tensors).problems().lines() == []


# Options and defaults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("turbo", (512, 1, 0.0, "euler_ancestral", "trailing")),
        ("lightning", (1024, 4, 0.0, "euler", "trailing")),
        ("hyper", (1024, 8, 0.0, "ddim", "trailing")),
        ("lcm", (1024, 4, 1.0, "lcm", "leading")),
    ],
)
def test_variants(variant: str, wanted: tuple[Any, ...], tmp_path: Path) -> None:
    d = recognised(tmp_path, layout("sdxl_base.single"), variant=variant).config.defaults
    assert (d.width, d.steps, d.guidance_scale, d.sampler, d.schedule) == wanted


@pytest.mark.parametrize("name", ["sd15.single", "sd21_base.single", "sdxl_base.single"])
def test_another_sampler_gets_the_schedule_that_from_config_gives(name: str, tmp_path: Path) -> None:
    """diffusers forgets the defaults of the class it comes from, and keeps what the config states."""
    config = recognised(tmp_path, layout(name)).config
    stated = dict(FAMILIES[config.family].scheduler)
    own = getattr(schedulers, stated.pop("_class_name"))
    before = own(**{k: v for k, v in stated.items() if k in signature(own).parameters})
    for sampler, (twin, _) in TWINS.items():
        other = getattr(schedulers, twin).from_config(before.config)
        request = ImageRequest(sampler=sampler).resolved(config)
        assert (request.sampler, request.schedule) == (
            sampler,
            other.config.get("timestep_spacing", "linspace"),
        )
    default = ImageRequest().resolved(config)
    assert (default.sampler, default.schedule) == (config.defaults.sampler, config.defaults.schedule)


def test_names_are_resolved(tmp_path: Path) -> None:
    config = recognised(tmp_path, layout("sd15.single")).config

    def resolved(**fields: Any) -> tuple[str | None, str | None]:
        request = ImageRequest(**fields).resolved(config)
        return request.sampler, request.schedule

    assert resolved(sampler="DPM++ 2M SDE Karras") == ("dpmpp_2m_sde", "karras")
    assert resolved(sampler="DPM++ 2M Karras", schedule="simple") == ("dpmpp_2m", "karras")
    assert resolved(sampler="Euler a", schedule="SGM Uniform") == ("euler_ancestral", "sgm_uniform")
    assert resolved(sampler="DPM++ 2M", schedule="Automatic") == ("dpmpp_2m", "karras")
    for field in ("sampler", "schedule"):
        with pytest.raises(InvalidRequest) as caught:
            resolved(**{field: "nonsense"})
        assert caught.value.field == field


def test_options_win_over_everything(tmp_path: Path) -> None:
    spec = {"modelspec.resolution": "640x448"}
    config = recognised(tmp_path, layout("sd15.single"), spec).config
    assert (config.defaults.width, config.defaults.height) == (640, 448)
    options = {
        "width": 256,
        "height": 320,
        "steps": 3,
        "guidance_scale": 0.0,
        "sampler": "heun",
        "schedule": "karras",
    }
    config = recognised(tmp_path, layout("sd15.single"), spec, **options).config
    assert config.defaults == replace(config.defaults, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"variant": "fast"}, {"prediction_type": "v"}, {"sampler_name": "euler"}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="allowed"):
        Options.of(options)


# Incomplete and strange files ------------------------------------------------------------------------------


def without(tensors: Layout, prefix: str) -> Layout:
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("first_stage_model.", "no vae; give one with the option vae"),
        ("cond_stage_model.", "sd1 without a text_encoder"),
        ("model.diffusion_model.", "no unet"),
    ],
)
def test_parts_that_a_merge_lost(prefix: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        recognised(tmp_path, without(layout("sd15.single"), prefix))


def test_sdxl_without_its_second_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="text_encoder_2"):
        recognised(tmp_path, without(layout("sdxl_base.single"), "conditioner.embedders.1."))


def test_a_text_encoder_of_another_model(tmp_path: Path) -> None:
    """The SD2 tower in an SD1 file gives states of another width."""
    mixed = without(layout("sd15.single"), "cond_stage_model.") | {
        k: v for k, v in layout("sd21_v.single").items() if k.startswith("cond_stage_model.")
    }
    with pytest.raises(CheckpointError, match="768 wide, the text encoders give 1024"):
        recognised(tmp_path, mixed)


def test_text_tower_without_text_model_in_its_names(tmp_path: Path) -> None:
    bare = {
        k.replace(".transformer.text_model.", ".transformer."): v for k, v in layout("sd15.single").items()
    }
    assert recognised(tmp_path, bare).problems().lines() == []


def test_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a known kind of checkpoint; its first tensors are a, b"):
        recognised(tmp_path, {"a": ((2,), "F32"), "b": ((2,), "F32")})
