"""What a model is: frozen values read from a checkpoint's keys, shapes, configs and header.

Nothing here has a default that describes one family; a config that is not complete cannot be built. The
numbers come from the checkpoint (`detect.py`), never from its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Depths = tuple[int, ...]
"""Transformer depth after each resnet of one block; 0 means no attention there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet. One entry per resolution level, highest resolution first.

    `down[i]` has one depth per resnet; `up[i]` is level `i` of the way back (one resnet more than `down[i]`
    in every known model); `mid_depth` is None when the middle block has no attention, and `mid_resnets` is
    2 normally, 1 (SSD-1B, Vega) or 0 (KOALA-700M) in pruned models.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    down: tuple[Depths, ...]
    mid_resnets: int
    mid_depth: int | None
    up: tuple[Depths, ...]
    heads: tuple[int, ...]
    """Number of attention heads per level."""
    context_dim: int
    linear_projection: bool
    """proj_in/proj_out of the transformers are linear (SD2, SDXL) or 1x1 convolutions (SD1)."""
    cross_attention_only: tuple[bool, ...]
    """Per level: attn1 attends to the text too (x4 upscaler)."""
    added_dim: int | None
    """Width of the vector fed to the added embedding (SDXL 2816, refiner 2560, unCLIP 1536/2048)."""
    added_kind: Literal["text_time", "projection"] | None
    class_count: int | None
    """Rows of the class embedding (x4 upscaler: 1000 noise levels)."""
    guidance_dim: int | None
    """Width of the guidance embedding of distilled (LCM) networks."""
    norm_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The shape of a KL autoencoder, and the affine map between its latents and the UNet's.

    `(z - shift) * scale` is what the UNet sees. `latents_mean`/`latents_std` (per channel) replace shift for
    Playground 2.5: `(z - mean) * scale / std`.
    """

    image_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    resnets: int
    """Resnets per encoder level; the decoder has one more."""
    quant_conv: bool
    scale: float
    shift: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    force_upcast: bool
    """float16 overflows in this decoder: run it in float32 (or bfloat16)."""
    norm_groups: int

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along each side."""
        return 1 << (len(self.channels) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """One CLIP text tower and the part of its output that the family uses.

    `layer` counts from the end of the tower that is stored: 0 is the last block's output, 1 the
    penultimate. `final_norm` applies the final layer norm to that state. `pad_id` fills the ids after the
    end-of-text token.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    vocab: int
    activation: Literal["quick_gelu", "gelu"]
    projection_dim: int | None
    layer: int
    final_norm: bool
    pad_id: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    """The training noise schedule and what the network predicts.

    `beta_schedule` is "scaled_linear" (linear in the square root, all Stable Diffusion) or "linear".
    """

    beta_start: float
    beta_end: float
    beta_schedule: Literal["scaled_linear", "linear"]
    train_steps: int
    zero_terminal_snr: bool
    prediction_type: PredictionType


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request gets when it does not say; from the checkpoint's own scheduler config or its family."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    schedule_for_all: bool
    """Other samplers take `schedule` too, because it is stated; else each that of its diffusers class."""


Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "x4-upscaler"]
Task = Literal["text", "inpaint", "edit", "depth", "upscale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that says what a checkpoint is.

    `task` is what the UNet's extra input channels mean: none ("text"), mask and masked image ("inpaint", 9
    channels), source image ("edit", instruct-pix2pix, 8), depth ("depth", 5), low-resolution image
    ("upscale", 7).
    """

    family: Family
    task: Task
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[TextConfig, ...]
    noise: NoiseConfig
    defaults: Defaults
    zero_empty_negative: bool
    """An absent negative prompt is zeros, not the encoding of "" (`force_zeros_for_empty_prompt`, SDXL)."""
    aesthetic_score: bool
    """The size conditioning ends in an aesthetic score (SDXL refiner) instead of the target size."""
    prediction_decided_by: str
    """How `noise.prediction_type` was found: "option", "scheduler config", "header", "marker key", "statistics"
    or "default"."""
