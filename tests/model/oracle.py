"""diffusers as the oracle: tiny random pipelines with the real topology of every family, saved as folders.

Weights are louder than a fresh network's, so that every input (text, sizes, mask, source image, label) moves
the result far more than the tolerance: what agrees here agrees because each input arrived in its place.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import schedulers
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffray.model import Engine, ImageRequest, Model, Result, load_model
from diffray.model.networks.tokenizer import ClipTokenizer
from diffray.model.weights.convert import convert

diffusers.utils.logging.set_verbosity_error()

TOLERANCE = 1e-4
SIDE = 32
"""Pixels; the tiny autoencoders have the real factor of 8 but for the upscaler's 4."""
MERGES = 1500
"""Merges of the tests' tokenizer, so that it loads quickly; "full" checkpoints have all 48894 of CLIP."""
TEXT = 128
"""Width of a text tower, two heads: one file does not say how many, so they follow the published rule of 64
channels each, as those of the SD2 and SDXL networks do."""
PROMPT = "a red fox, in the snow"
NEGATIVE = "blurry photo"

_folders = tempfile.TemporaryDirectory(prefix="diffray-oracle-")

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UPSCALER_BETAS = BETAS | {"beta_start": 0.0001, "beta_end": 0.02}
NO_SAFETY: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}

TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"}),
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 1}),
    "deis": ("DEISMultistepScheduler", {"steps_offset": 1}),
    "lcm": ("LCMScheduler", {"steps_offset": 1}),
    "tcd": ("TCDScheduler", {"steps_offset": 1}),
}
"""Our samplers that have a diffusers scheduler, its class and its keys in Stable Diffusion's folders.

Not here: `dpmpp_sde`, whose Brownian noise in diffusers is seeded apart from the generator, and the two that
diffusers lacks, `dpmpp_2s_ancestral` and `dpmpp_3m_sde`. Their tables are checked in `test_samplers.py`.
"""


def scheduler(sampler: str, schedule: str, *, betas: Mapping[str, Any] = BETAS, **keys: Any) -> Any:
    """diffusers' scheduler object for our two names."""
    name, own = TWINS[sampler]
    spacing, _, curve = schedule.rpartition("_")
    if curve in ("karras", "exponential", "beta"):
        own = own | {f"use_{curve}_sigmas": True, "timestep_spacing": spacing or "linspace"}
    else:
        own = own | {"timestep_spacing": schedule}
    if sampler == "dpmpp_2s":
        own.pop("timestep_spacing")
    return getattr(schedulers, name)(**betas, **own, **keys)


# The pipelines ---------------------------------------------------------------------------------------------


def _unet(**keys: Any) -> diffusers.UNet2DConditionModel:
    channels = keys.setdefault("block_out_channels", (32, 64))
    down = keys.setdefault("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": SIDE // 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
            "cross_attention_dim": TEXT,
            "attention_head_dim": 8,
            "norm_num_groups": min(channels) // 2,
        }
        | keys
    )


def _vae(levels: int, scale: float) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32)[-levels:],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=scale,
    )


def _text(vocab: int, *, projection: bool = False, act: str = "quick_gelu", layers: int = 3) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=layers,
        num_attention_heads=TEXT // 64,
        hidden_act=act,
        projection_dim=TEXT,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@functools.cache
def _tokenizer(pad: str, *, full: bool) -> CLIPTokenizer:
    """CLIP's tokenizer with the first merges or all."""
    folder = Path(_folders.name, f"tokenizer-{full}")
    folder.mkdir(exist_ok=True)
    files = ClipTokenizer.openai().files()
    if not full:
        ids = sorted(json.loads(files["vocab.json"]).items(), key=lambda item: item[1])
        kept = [token for token, _ in (*ids[: 512 + MERGES], *ids[-2:])]
        files["vocab.json"] = json.dumps({token: index for index, token in enumerate(kept)})
        files["merges.txt"] = "\n".join(files["merges.txt"].split("\n")[: MERGES + 1]) + "\n"
    for name, text in files.items():
        (folder / name).write_text(text)
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad)


def _louder(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights that let signals through: every product keeps its variance, every bias is there."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if isinstance(module.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding):
            parameter.data = noise
        elif parameter.dim() > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        elif name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        else:
            parameter.data = 0.1 * noise


SD2: dict[str, Any] = {
    "use_linear_projection": True,
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
}
XL: dict[str, Any] = SD2 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 2 * TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT + 6 * 8,
}
UPSCALER: dict[str, Any] = {
    "in_channels": 7,
    "use_linear_projection": True,
    "num_class_embeds": 1000,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "only_cross_attention": (True, True, False),
}
REFINER: dict[str, Any] = XL | {
    "cross_attention_dim": TEXT,
    "projection_class_embeddings_input_dim": TEXT + 5 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd1-inpaint": {"in_channels": 9},
    "pix2pix": {"in_channels": 8},
    "lcm": {"time_cond_proj_dim": 16},
    "sd2": SD2,
    "depth": SD2 | {"in_channels": 5},
    "upscaler": UPSCALER,
    "sdxl": XL,
    "sdxl-inpaint": XL | {"in_channels": 9},
    "sdxl-edit": XL | {"in_channels": 8},
    "refiner": REFINER,
}


@functools.cache
def components(kind: str, *, full: bool = False) -> dict[str, Any]:
    """The parts of a pipeline, by the names that diffusers' classes take."""
    generator = torch.Generator().manual_seed(sorted(UNETS).index(kind))
    xl, upscaler = kind.startswith(("sdxl", "refiner")), kind == "upscaler"
    openclip = kind in ("sd2", "depth", "upscaler")
    parts: dict[str, Any] = {"unet": _unet(**UNETS[kind])}
    parts["vae"] = _vae(3, 0.08333) if upscaler else _vae(4, 0.13025 if xl else 0.18215)
    parts["tokenizer"] = _tokenizer("!" if openclip else "<|endoftext|>", full=full)
    vocab = len(parts["tokenizer"])
    parts["text_encoder"] = _text(vocab, act="gelu" if openclip else "quick_gelu")
    if xl:
        parts["text_encoder_2"] = _text(vocab, projection=True, act="gelu", layers=4)
        parts["tokenizer_2"] = _tokenizer("!", full=full)
    if kind == "refiner":
        parts |= {"tokenizer": None, "text_encoder": None}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            _louder(part, generator)
    # A posterior with a spread that shows, but not only spread.
    parts["vae"].quant_conv.bias.data[4:] = -2.0
    return parts


def own_scheduler(kind: str) -> Any:
    """The scheduler of the published folder."""
    if kind.startswith(("sdxl", "refiner")):
        return scheduler("euler", "leading")
    if kind == "lcm":
        return scheduler("lcm", "leading")
    if kind == "upscaler":
        return scheduler("ddim", "leading", betas=UPSCALER_BETAS, prediction_type="v_prediction")
    if kind == "sd2":
        return scheduler("ddim", "leading", prediction_type="v_prediction")
    return scheduler("pndm", "leading")


CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sd2": "StableDiffusionPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-edit": "StableDiffusionXLInstructPix2PixPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


@functools.cache
def folder(kind: str, *, full: bool = False) -> Path:
    """A checkpoint folder, each part written by the library that it belongs to."""
    path, parts = Path(_folders.name, f"{kind}-{full}"), components(kind, full=full)
    planner = own_scheduler(kind)
    index: dict[str, Any] = {"_class_name": CLASSES[kind], "_diffusers_version": diffusers.__version__}
    for name, part in {**parts, "scheduler": planner}.items():
        if part is not None:
            part.save_pretrained(path / name)
            library = "transformers" if "text" in name or "token" in name else "diffusers"
            index[name] = [library, type(part).__name__]
    if kind.startswith(("sdxl", "refiner")):
        index["force_zeros_for_empty_prompt"] = kind != "refiner"
        index["requires_aesthetics_score"] = kind == "refiner"
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@functools.cache
def single_file(kind: str) -> Path:
    """The full checkpoint as one file in the layout of the original repositories."""
    path = Path(_folders.name, f"{kind}.safetensors")
    convert(str(folder(kind, full=True)), path, layout="single")
    return path


@functools.cache
def model(kind: str, **options: Any) -> Model:
    """Our model of that checkpoint; shared, so leave it as it is."""
    return load_model(str(folder(kind)), device="cpu", dtype="float32", **options)


def pipeline(kind: str, name: str | None = None, planner: Any = None) -> Any:
    """A new diffusers pipeline over the same parts; `name` is its class without StableDiffusion[XL]."""
    cls = CLASSES[kind]
    xl = "XL" if kind.startswith(("sdxl", "refiner")) else ""
    if name is not None:
        cls = f"StableDiffusion{xl}{name}Pipeline"
    parts = components(kind) | {"scheduler": planner or own_scheduler(kind)}
    if xl:
        if "Edit" not in cls and "Pix2Pix" not in cls:
            parts |= {"add_watermarker": False}
        parts |= {"force_zeros_for_empty_prompt": kind != "refiner"}
        if "Img2Img" in cls or "Inpaint" in cls:
            parts |= {"requires_aesthetics_score": kind == "refiner"}
    elif kind == "upscaler":
        low = schedulers.DDPMScheduler(**UPSCALER_BETAS)
        parts |= {"low_res_scheduler": low, "safety_checker": None, "feature_extractor": None}
    elif kind == "depth":
        parts |= {"depth_estimator": None, "feature_extractor": None}
    else:
        parts |= NO_SAFETY
    pipe = getattr(diffusers, cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Comparing -------------------------------------------------------------------------------------------------


def theirs(pipe: Any, *, seed: int = 0, output: str = "latent", **arguments: Any) -> Any:
    """diffusers' result: latents [C, h, w] or a PIL image."""
    arguments.setdefault("prompt", PROMPT)
    if not arguments.keys().isdisjoint({"prompt_embeds"}):
        arguments.pop("prompt")
    return pipe(generator=torch.Generator().manual_seed(seed), output_type=output, **arguments).images[0]


def ours(own: Model, *, batch_size: int = 1, rows: int | None = None, **fields: Any) -> Result:
    """Our result of one request, alone in a new engine."""
    request = ImageRequest(**{"prompt": PROMPT, **fields})
    return Engine(own, batch_size=batch_size, rows=rows).generate([request])[0]


def latents(own: Model, **fields: Any) -> Tensor:
    """The finished latents [C, h, w] of one request."""
    found = ours(own, **fields, output="latents").latents
    assert found is not None
    return found


def picture(own: Model, **fields: Any) -> Image.Image:
    """The picture of one request."""
    found = ours(own, **fields).image
    assert found is not None
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def levels(got: Image.Image, wanted: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 255."""
    assert got.size == wanted.size
    return int(np.abs(np.asarray(got).astype(int) - np.asarray(wanted).astype(int)).max())


def source_image(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def mask_image(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """White (repaint) in the left half and in a corner, black elsewhere."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, : width // 2] = 255
    mask[: height // 4] = 255
    return Image.fromarray(mask)


def inputs(kind: str) -> dict[str, Any]:
    """The fields that a request to this kind of model needs."""
    if kind == "upscaler":
        return {"init_image": source_image(SIDE // 4, SIDE // 4)}
    if kind.endswith("inpaint"):
        return {"init_image": source_image(), "mask": mask_image()}
    if kind in ("pix2pix", "sdxl-edit", "refiner"):
        return {"init_image": source_image()}
    if kind == "depth":
        return {"init_image": source_image(), "depth": source_image(seed=1)}
    return {"width": SIDE, "height": SIDE}
