"""The JSON files of a diffusers folder, and header metadata of a single file, from a `ModelConfig`.

A folder written from them loads in diffusers and transformers; what the source itself said wins over what is
made here (`convert.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

from ..config import Family, ModelConfig, Task, TextConfig, UNetConfig, VAEConfig
from ..errors import CheckpointError
from ..networks.text import hf_config
from .blueprint import Blueprint
from .checkpoint import TOKENIZERS
from .families import FAMILIES, VARIANTS, Options

SCHEDULER = "scheduler/scheduler_config.json"
DIFFUSERS_VERSION = "0.42.1"
"""The release whose class and field names are written."""

PIPELINES: Mapping[tuple[Family, Task], str] = {
    ("sd1", "text"): "StableDiffusionPipeline",
    ("sd2", "text"): "StableDiffusionPipeline",
    ("sd1", "inpaint"): "StableDiffusionInpaintPipeline",
    ("sd2", "inpaint"): "StableDiffusionInpaintPipeline",
    ("sd1", "edit"): "StableDiffusionInstructPix2PixPipeline",
    ("sd2", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("x4-upscaler", "upscale"): "StableDiffusionUpscalePipeline",
    ("sdxl", "text"): "StableDiffusionXLPipeline",
    ("sdxl", "inpaint"): "StableDiffusionXLInpaintPipeline",
    ("sdxl", "edit"): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl-refiner", "text"): "StableDiffusionXLImg2ImgPipeline",
}
ARCHITECTURES: Mapping[Family, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "x4-upscaler": "stable-diffusion-v2-x4-upscaler",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
"""modelspec.architecture of Stability's model metadata standard."""


def folder_texts(
    blueprint: Blueprint, options: Options, names: Container[str] | None = None
) -> dict[str, str]:
    """Relative path to content of the folder's configs and tokenizer files; of those in `names`, if given.

    The source's own file stays as it is, unless an option outdates it.

    Raises:
        CheckpointError: diffusers' config has no way to say what this UNet is.
    """
    config, kept = blueprint.config, blueprint.checkpoint.texts
    made: dict[str, Callable[[], Mapping[str, Any]]] = {
        "model_index.json": lambda: model_index(blueprint, options),
        "unet/config.json": lambda: unet_json(config),
        "vae/config.json": lambda: vae_json(config.vae),
        SCHEDULER: lambda: scheduler_json(blueprint, options),
    }
    if config.family == "x4-upscaler":
        made["low_res_scheduler/scheduler_config.json"] = low_res_scheduler
    texts = {name: text for name, text in kept.items() if not _outdated(name, blueprint, options)}
    for name, part in blueprint.parts.items():
        if isinstance(part.config, TextConfig):
            made[f"{name}/config.json"] = partial(text_json, part.config)
            files = blueprint.tokenizers[name].files(part.config.pad_id)
            texts = {f"{TOKENIZERS[name]}/{file}": text for file, text in files.items()} | texts
    texts |= {
        name: json.dumps(make(), indent=2) + "\n"
        for name, make in made.items()
        if name not in texts and (names is None or name in names)
    }
    return texts if names is None else {name: text for name, text in texts.items() if name in names}


def _outdated(name: str, blueprint: Blueprint, options: Options) -> bool:
    """Whether the source's own file of that name is not true of what is written."""
    if name == "model_index.json":
        return True  # it may name parts that are not written
    if name == "vae/config.json":
        return blueprint.parts["vae"].stored.weights not in blueprint.checkpoint.weights.values()
    if name != SCHEDULER:
        return False
    unsaid = {"prediction_type": FAMILIES[blueprint.config.family].scheduler["prediction_type"]}
    stated = unsaid | (blueprint.checkpoint.config(SCHEDULER) or {})
    return stated != scheduler_json(blueprint, options)


def model_index(blueprint: Blueprint, options: Options) -> dict[str, Any]:
    """`model_index.json`: which class loads which sub-folder. Parts that are not written become null."""
    config = blueprint.config
    stated = blueprint.checkpoint.config("model_index.json") or {}
    pipeline = PIPELINES.get((config.family, config.task), "StableDiffusionPipeline")
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION}
    for name, part in blueprint.parts.items():
        if isinstance(part.config, TextConfig):
            projected = "WithProjection" if part.config.projection_dim is not None else ""
            index[name] = ["transformers", f"CLIPTextModel{projected}"]
            index[TOKENIZERS[name]] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", scheduler_of(blueprint, options)["_class_name"]]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if config.family in ("sd1", "sd2"):
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    if config.family == "x4-upscaler":
        index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
    if config.family in ("sdxl", "sdxl-refiner"):
        index["force_zeros_for_empty_prompt"] = config.zero_empty_negative
    if config.family == "sdxl-refiner":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        index["requires_aesthetics_score"] = config.aesthetic_score
    for key, value in stated.items():
        if not isinstance(value, list):
            index[key] = value if key != "requires_safety_checker" else False
        elif key not in index:
            index[key] = [None, None]
    return index


def scheduler_of(blueprint: Blueprint, options: Options) -> dict[str, Any]:
    """The source's scheduler config, else its family's; the variant's on top."""
    base = dict(blueprint.checkpoint.config(SCHEDULER) or FAMILIES[blueprint.config.family].scheduler)
    variant = VARIANTS.get(options.variant or "")
    return base if variant is None else base | dict(variant.scheduler)


def scheduler_json(blueprint: Blueprint, options: Options) -> dict[str, Any]:
    """`scheduler_config.json` with the prediction type and the terminal SNR that were decided."""
    scheduler, noise = scheduler_of(blueprint, options), blueprint.config.noise
    scheduler["prediction_type"] = noise.prediction_type
    if noise.zero_terminal_snr or "rescale_betas_zero_snr" in scheduler:
        scheduler["rescale_betas_zero_snr"] = noise.zero_terminal_snr
    return scheduler


def low_res_scheduler() -> dict[str, Any]:
    """What noises the low-resolution image of the x4 upscaler."""
    noise = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
    }
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **noise,
        "clip_sample": True,
    }


def unet_json(config: ModelConfig) -> dict[str, Any]:
    """`unet/config.json`.

    Raises:
        CheckpointError: a topology that `UNet2DConditionModel` cannot be told to build.
    """
    unet = config.unet
    _check_expressible(unet)
    depths = _transformer_depths(unet)
    result: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": config.defaults.height // config.vae.factor,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in unet.down],
        "mid_block_type": {2: "UNetMidBlock2DCrossAttn", 1: "UNetMidBlock2D", 0: None}[unet.mid_resnets],
        "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in reversed(unet.up)],
        "layers_per_block": _same([len(d) for d in unet.down]),
        "transformer_layers_per_block": depths,
        "attention_head_dim": _same(unet.heads),
        "cross_attention_dim": unet.context_dim,
        "use_linear_projection": unet.linear_projection,
        "only_cross_attention": _same(unet.cross_attention_only),
        "norm_num_groups": unet.norm_groups,
        "norm_eps": 1e-05,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "upcast_attention": config.family == "sd2" and config.noise.prediction_type == "v_prediction",
        "num_class_embeds": unet.class_count,
        "time_cond_proj_dim": unet.guidance_dim,
    }
    if isinstance(depths, list) and any(isinstance(d, list) for d in depths):
        result["reverse_transformer_layers_per_block"] = [list(d) for d in reversed(unet.up)]
    if unet.added_kind == "projection":
        result |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": unet.added_dim}
    elif unet.added_dim is not None:
        numbers = 5 if config.aesthetic_score else 6
        pooled = config.text[-1].projection_dim or 0
        result |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (unet.added_dim - pooled) // numbers,
            "projection_class_embeddings_input_dim": unet.added_dim,
        }
    return result


def _transformer_depths(unet: UNetConfig) -> Any:
    """Depth per level; per resnet where the way up differs (SSD-1B). Levels without attention say 1, or for
    the last the depth of the middle block, which diffusers reads there."""
    levels = len(unet.channels)
    if any(len(set(unet.down[i] + unet.up[i])) > 1 for i in range(levels)):
        return [list(depths) for depths in unet.down]
    fallback = [1] * (levels - 1) + [unet.mid_depth or 1]
    return _same([unet.down[i][0] or fallback[i] for i in range(levels)])


def _check_expressible(unet: UNetConfig) -> None:
    mixed = any(0 in d and any(d) for d in (*unet.down, *unet.up))
    uneven = any(len(up) != len(down) + 1 for down, up in zip(unet.down, unet.up, strict=True))
    last = max(unet.down[-1])
    middle = unet.mid_depth is not None and last and unet.mid_depth != last
    attended = (unet.mid_resnets == 2) == (unet.mid_depth is not None)
    if mixed or uneven or middle or not attended or unet.mid_resnets > 2:
        raise CheckpointError("this UNet's blocks cannot be written as a diffusers config")


def vae_json(vae: VAEConfig) -> dict[str, Any]:
    """`vae/config.json`."""
    levels = len(vae.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": vae.image_channels,
        "out_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": list(vae.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": vae.resnets,
        "norm_num_groups": vae.norm_groups,
        "act_fn": "silu",
        "scaling_factor": vae.scale,
        "shift_factor": vae.shift or None,
        "latents_mean": None if vae.latents_mean is None else list(vae.latents_mean),
        "latents_std": None if vae.latents_std is None else list(vae.latents_std),
        "force_upcast": vae.force_upcast,
        "use_quant_conv": vae.quant_conv,
        "use_post_quant_conv": vae.quant_conv,
    }


def text_json(text: TextConfig) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    kind = "CLIPTextModel" if text.projection_dim is None else "CLIPTextModelWithProjection"
    values: dict[str, Any] = hf_config(text).to_dict()
    return values | {"architectures": [kind], "model_type": "clip_text_model"}


def modelspec(config: ModelConfig) -> dict[str, str]:
    """Standard header metadata of a single file (Stability's modelspec 1.0.0)."""
    architecture, v = ARCHITECTURES[config.family], config.noise.prediction_type == "v_prediction"
    if config.family == "sd2" and v:
        architecture = "stable-diffusion-v2-768-v"
    if config.task == "inpaint":
        architecture += "-inpainting"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffray",
        "modelspec.prediction_type": "v" if v else config.noise.prediction_type,
        "modelspec.resolution": f"{config.defaults.width}x{config.defaults.height}",
    }


def _same(values: Any) -> Any:
    """One value where all are equal, else a list."""
    return values[0] if len(set(values)) == 1 else list(values)
