"""Noise schedule, prediction type and request defaults: what shapes cannot tell, in a fixed order of evidence.

prediction type:  option > scheduler config > header > marker key > statistics (SD2) > the family's
defaults:         option > distillation variant > checkpoint > the family's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..config import Defaults, Family, NoiseConfig, PredictionType, Task, UNetConfig
from ..errors import CheckpointError, InvalidRequest
from ..sampling.sampler_names import sampler_from_scheduler_config, states_schedule
from .detect import Json
from .families import FAMILIES, VARIANTS, Options

LCM_EMBEDDED_GUIDANCE = 8.5
"""Guidance default of networks that take the scale as an embedding (diffusers' pipeline for them)."""
EDIT_STEPS = 100
INPAINT_GUIDANCE = 7.5
"""What diffusers' pipelines of these tasks take, of whichever family."""


SD2_V_KEY = "up_blocks.{}.attentions.{}.transformer_blocks.0.norm1.bias"
SD2_V_SPREAD = 0.09
"""Above it, the standard deviation of that bias marks a v-prediction SD2 (ComfyUI's statistic)."""
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MODELSPEC = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a checkpoint says besides shapes.

    Attributes:
        scheduler: `scheduler_config.json`, or what stands for it in a header.
        metadata: the header's free text.
        markers: names of the keys outside every part.
        spread: standard deviation of a UNet tensor by its folder name, None when absent.
    """

    scheduler: Json | None
    metadata: Mapping[str, str]
    markers: frozenset[str]
    spread: Callable[[str], float | None]


def noise_of(
    family: Family, task: Task, unet: UNetConfig, evidence: Evidence, options: Options
) -> tuple[NoiseConfig, str]:
    """The training noise, and how the prediction type was decided.

    Raises:
        CheckpointError: a kind of noise that is not implemented (flow matching, EDM).
    """
    if found := sorted(set(EDM) & evidence.markers):
        raise CheckpointError(f"EDM-preconditioned checkpoint ({', '.join(found)}): not supported")
    stated = dict(FAMILIES[family].scheduler) | dict(evidence.scheduler or {})
    name = str(stated["_class_name"])
    if (
        "Flow" in name
        or "EDM" in name
        or stated.get("use_flow_sigmas")
        or stated["prediction_type"] == "flow_prediction"
    ):
        raise CheckpointError(
            f"scheduler {name}: flow matching and EDM noise are not supported by the UNet family"
        )
    if stated.get("trained_betas") is not None:
        raise CheckpointError("scheduler: trained_betas are not supported")
    if stated["beta_schedule"] not in ("scaled_linear", "linear"):
        raise CheckpointError(f"scheduler: beta_schedule {stated['beta_schedule']!r} is not supported")
    prediction, decided_by = _prediction(family, task, unet, evidence, options)
    if prediction not in get_args(PredictionType):
        raise CheckpointError(f"scheduler: prediction_type {prediction!r} is not supported")
    snr = options.zero_terminal_snr
    if snr is None:
        snr = bool(stated.get("rescale_betas_zero_snr", "ztsnr" in evidence.markers))
    noise = NoiseConfig(
        beta_start=float(stated["beta_start"]),
        beta_end=float(stated["beta_end"]),
        beta_schedule=stated["beta_schedule"],
        train_steps=int(stated["num_train_timesteps"]),
        zero_terminal_snr=snr,
        prediction_type=prediction,
    )
    return noise, decided_by


def _prediction(
    family: Family, task: Task, unet: UNetConfig, evidence: Evidence, options: Options
) -> tuple[Any, str]:
    if options.prediction_type is not None:
        return options.prediction_type, "option"
    if evidence.scheduler and "prediction_type" in evidence.scheduler:
        return evidence.scheduler["prediction_type"], "scheduler config"
    spec = evidence.metadata.get("modelspec.prediction_type")
    if spec in MODELSPEC:
        return MODELSPEC[spec], "header"
    if "v_pred" in evidence.markers:
        return "v_prediction", "marker key"
    if family == "sd2" and unet.added_kind == "projection":
        return "v_prediction", "default"  # both published unCLIP models
    true_sd2 = family == "sd2" and task == "text" and (unet.channels[0], unet.context_dim) == (320, 1024)
    if true_sd2 and options.variant is None:
        spread = evidence.spread(SD2_V_KEY.format(len(unet.up) - 1, len(unet.up[0]) - 1))
        if spread is not None:
            return ("v_prediction" if spread > SD2_V_SPREAD else "epsilon"), "statistics"
    return FAMILIES[family].scheduler["prediction_type"], "default"


def defaults_of(
    family: Family,
    task: Task,
    noise: NoiseConfig,
    unet: UNetConfig,
    factor: int,
    evidence: Evidence,
    sample_size: object,
    options: Options,
) -> Defaults:
    """Request defaults: options, else the distillation variant, else the checkpoint, else the family.

    `factor` is pixels per latent pixel, `sample_size` the training side in latent pixels of unet/config.json.
    """
    facts = FAMILIES[family]
    variant = VARIANTS.get(options.variant or ("lcm" if unet.guidance_dim is not None else ""))
    width = height = facts.side if noise.prediction_type == "epsilon" or family != "sd2" else 768
    if isinstance(sample_size, int) and not isinstance(sample_size, bool) and 0 < sample_size <= 1024:
        width = height = sample_size * factor
    elif match := re.fullmatch(r"(\d{2,4})x(\d{2,4})", evidence.metadata.get("modelspec.resolution", "")):
        width, height = (int(n) // factor * factor for n in match.groups())
    steps = EDIT_STEPS if task == "edit" else facts.steps
    guidance = INPAINT_GUIDANCE if task == "inpaint" else facts.guidance
    scheduler = {"_class_name": facts.scheduler["_class_name"]} | dict(evidence.scheduler or facts.scheduler)
    if variant is not None:
        width, height = (variant.side, variant.side) if variant.side else (width, height)
        steps, guidance = variant.steps, variant.guidance
        scheduler |= variant.scheduler
        if unet.guidance_dim is not None:
            guidance = LCM_EMBEDDED_GUIDANCE
    sampler, schedule = sampler_of(scheduler)
    return Defaults(
        width=options.width or width,
        height=options.height or height,
        steps=options.steps or steps,
        guidance_scale=guidance if options.guidance_scale is None else options.guidance_scale,
        sampler=options.sampler or sampler,
        schedule=options.schedule or schedule,
        schedule_for_all=options.schedule is not None or states_schedule(scheduler),
    )


def sampler_of(scheduler: Json) -> tuple[str, str]:
    """Sampler and schedule names of a diffusers scheduler config."""
    try:
        return sampler_from_scheduler_config(scheduler)
    except InvalidRequest as error:
        raise CheckpointError(f"scheduler config: {error}") from error
