"""What belongs to a family and not to a file's shapes: text use, latent scale, noise, defaults; and the options
with which a caller overrules them.

Numbers are those of the published folders (scheduler_config.json, config.json) and of diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from ..config import Family, PredictionType, Task, UNetConfig
from ..errors import CheckpointError
from ..networks.towers import TextUse

EOS = None
SD1_TEXT = TextUse(layer=0, final_norm=True, pad=EOS)
SD2_TEXT = TextUse(layer=0, final_norm=True, pad=0)
XL_TEXT = TextUse(layer=1, final_norm=False, pad=EOS)
XL_TEXT_2 = TextUse(layer=1, final_norm=False, pad=0)


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """One row of `FAMILIES`.

    Attributes:
        text: part name to what the family takes from that tower.
        scale: of the latents.
        force_upcast: the decoder overflows in float16, when no config says.
        scheduler: the scheduler config of the published folder.
        side, steps, guidance: request defaults.
        zero_empty_negative, aesthetic_score: see `ModelConfig`.
    """

    text: Mapping[str, TextUse]
    scale: float
    force_upcast: bool
    scheduler: Mapping[str, Any]
    side: int
    steps: int
    guidance: float
    zero_empty_negative: bool = False
    aesthetic_score: bool = False


BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
PNDM = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True}
DDIM = {"_class_name": "DDIMScheduler", **BETAS}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **BETAS,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

FAMILIES: Mapping[Family, FamilyFacts] = {
    "sd1": FamilyFacts({"text_encoder": SD1_TEXT}, 0.18215, False, PNDM, 512, 50, 7.5),
    "sd2": FamilyFacts({"text_encoder": SD2_TEXT}, 0.18215, False, DDIM, 512, 50, 7.5),
    "x4-upscaler": FamilyFacts(
        {"text_encoder": SD2_TEXT},
        0.08333,
        False,
        DDIM | {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"},
        512,
        75,
        9.0,
    ),
    "sdxl": FamilyFacts(
        {"text_encoder": XL_TEXT, "text_encoder_2": XL_TEXT_2},
        0.13025,
        True,
        EULER,
        1024,
        50,
        5.0,
        zero_empty_negative=True,
    ),
    "sdxl-refiner": FamilyFacts(
        {"text_encoder_2": XL_TEXT_2}, 0.13025, True, EULER, 1024, 50, 5.0, aesthetic_score=True
    ),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A distilled finetune that weights do not tell apart from its base."""

    scheduler: Mapping[str, Any]
    steps: int
    guidance: float
    side: int | None = None


TRAILING = {"timestep_spacing": "trailing"}
VARIANTS: Mapping[str, Variant] = {
    "turbo": Variant(TRAILING | {"_class_name": "EulerAncestralDiscreteScheduler"}, 1, 0.0, 512),
    "lightning": Variant(TRAILING | {"_class_name": "EulerDiscreteScheduler"}, 4, 0.0),
    "hyper": Variant(TRAILING | {"_class_name": "DDIMScheduler"}, 8, 0.0),
    "lcm": Variant({"_class_name": "LCMScheduler", "original_inference_steps": 50}, 4, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of `load_model` knows better than the checkpoint; None leaves it to the checkpoint.

    Attributes:
        prediction_type: "epsilon", "v_prediction" or "sample".
        zero_terminal_snr: the schedule was rescaled so that the last step is pure noise.
        variant: "turbo", "lightning", "hyper" or "lcm": the defaults of that distillation.
        width, height, steps, guidance_scale, sampler, schedule: request defaults.
        ema: take the moving average of a training checkpoint instead of its plain weights.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    variant: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    ema: bool = False

    def over(self, brought: Mapping[str, Any] | None) -> Options:
        """These options, and where they leave something open, those that the checkpoint brings itself."""
        asked = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return Options.of({**(brought or {}), **asked})

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("prediction_type", self.prediction_type, get_args(PredictionType)),
            ("variant", self.variant, tuple(VARIANTS)),
        ):
            if value is not None and value not in allowed:
                raise CheckpointError(f"option {name}: got {value!r}, allowed is one of {', '.join(allowed)}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Options from keyword arguments.

        Raises:
            CheckpointError: an unknown name or a value that is not allowed.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(
                f"unknown option {', '.join(unknown)}; allowed are {', '.join(sorted(known))}"
            )
        return cls(**values)


def family_of(unet: UNetConfig, towers: Mapping[str, str]) -> Family:
    """The family of a UNet and the text towers that stand next to it (part name to "clip" or "openclip").

    Raises:
        CheckpointError: no family has these towers.
    """
    if unet.class_count is not None:
        return "x4-upscaler"
    for family in ("sdxl", "sdxl-refiner"):
        if unet.added_kind == "text_time" and set(FAMILIES[family].text) == set(towers):
            return family
    if unet.added_kind == "text_time":
        got = ", ".join(sorted(towers)) or "none"
        raise CheckpointError(
            f"an SDXL UNet needs text_encoder and text_encoder_2 (the refiner the latter), got {got}"
        )
    return "sd2" if towers.get("text_encoder") == "openclip" or unet.linear_projection else "sd1"


def task_of(unet: UNetConfig, latents: int) -> Task:
    """What the UNet's extra input channels mean; `latents` is the number of latent channels.

    Raises:
        CheckpointError: a number of channels that no known task has.
    """
    extra = unet.in_channels - latents
    tasks: dict[int, Task] = {latents + 1: "inpaint", latents: "edit", 1: "depth", 0: "text"}
    if unet.class_count is not None:
        tasks = {3: "upscale"}
    if extra not in tasks or unet.out_channels != latents:
        wanted = ", ".join(str(latents + n) for n in sorted(tasks))
        raise CheckpointError(
            f"UNet: {unet.in_channels} channels in and {unet.out_channels} out, "
            f"allowed with {latents} latent channels are {wanted} in and {latents} out"
        )
    return tasks[extra]
