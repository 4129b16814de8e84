"""The names of samplers and schedules: ours, and those that users of other tools know.

Names of diffusers classes, ComfyUI and AUTOMATIC1111 all resolve, whatever their case and punctuation:
"DPMSolverMultistepScheduler", "dpmpp_2m_sde_gpu", "DPM++ 2M SDE Karras". No numerics here.

A name means the sampler, not the rounding, of its tool: ComfyUI's `uni_pc` (B(h) = h) is taken for the other
kind, `uni_pc_bh2`, which is diffusers'; AUTOMATIC1111's Polyexponential of rho 1, its default, is Exponential.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequest
from .schedule import CURVES, SCHEDULES

_SAMPLER_ALIASES: dict[str, tuple[str, ...]] = {
    "euler": ("EulerDiscreteScheduler", "Euler Simple"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": ("HeunDiscreteScheduler",),
    "dpm2": ("KDPM2DiscreteScheduler", "dpm_2"),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", "DPM2 a"),
    "lms": ("LMSDiscreteScheduler",),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", "DPMSolverSinglestep"),
    "dpmpp_2s_ancestral": ("DPM++ 2S a",),
    "dpmpp_sde": ("DPMSolverSDEScheduler",),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "DPMSolverMultistep"),
    "dpmpp_2m_sde": (),
    "dpmpp_3m_sde": (),
    "ddim": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
    "pndm": ("PNDMScheduler", "PLMS"),
    "unipc": ("UniPCMultistepScheduler", "uni_pc", "uni_pc_bh2"),
    "deis": ("DEISMultistepScheduler",),
    "lcm": ("LCMScheduler",),
    "tcd": ("TCDScheduler",),
}
SAMPLER_NAMES = tuple(_SAMPLER_ALIASES)

_SCHEDULE_ALIASES: dict[str, tuple[str, ...]] = {
    "leading": ("ddim_uniform", "DDIM"),
    "trailing": ("Turbo",),
    "exponential": ("Polyexponential",),
    "normal": ("Uniform", "discrete"),
    "ays": ("Align Your Steps", "AYS SDXL"),
}
_AUTOMATIC = {
    "karras": ("dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m"),
    "exponential": ("dpmpp_2m_sde", "dpmpp_3m_sde"),
}
"""AUTOMATIC1111's schedule "Automatic", by sampler; "normal" for those not named."""


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _index(aliases: Mapping[str, tuple[str, ...]], names: tuple[str, ...]) -> dict[str, str]:
    return {_key(known): name for name in names for known in (name, *aliases.get(name, ()))}


_SAMPLERS = _index(_SAMPLER_ALIASES, SAMPLER_NAMES)
_SCHEDULES = _index(_SCHEDULE_ALIASES, SCHEDULES)


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """(canonical sampler, canonical schedule or None) of a name such as "DPM++ 2M Karras".

    Raises:
        InvalidRequest: an unknown name; the message has the closest ones and all.
    """
    key = _key(name)
    found = _find_sampler(key)
    if found is not None:
        return found, None
    for tail in sorted(_SCHEDULES, key=len, reverse=True):
        if key.endswith(tail):
            found = _find_sampler(key.removesuffix(tail))
            if found is not None:
                return found, _SCHEDULES[tail]
    raise _unknown("sampler", name, _SAMPLERS, SAMPLER_NAMES)


def resolve_schedule(name: str, sampler: str = "euler") -> str:
    """The canonical schedule of a name; "automatic" depends on the canonical sampler.

    Raises:
        InvalidRequest: an unknown name; the message has the closest ones and all.
    """
    key = _key(name)
    if key == "automatic":
        return next((known for known, users in _AUTOMATIC.items() if sampler in users), "normal")
    if key not in _SCHEDULES:
        raise _unknown("schedule", name, _SCHEDULES, SCHEDULES)
    return _SCHEDULES[key]


def _find_sampler(key: str) -> str | None:
    """Exact, or with the decorations of other tools: "_gpu" of ComfyUI, "k_" of the Stability API."""
    for known in (key, key.removesuffix("gpu"), key.removeprefix("k")):
        if known in _SAMPLERS:
            return _SAMPLERS[known]
    return None


def _unknown(field: str, name: str, index: Mapping[str, str], names: tuple[str, ...]) -> InvalidRequest:
    close = difflib.get_close_matches(_key(name), index, n=3)
    hint = f", did you mean {' or '.join(dict.fromkeys(index[c] for c in close))}?" if close else ","
    return InvalidRequest(field, f"got {name!r}{hint} allowed is one of {', '.join(names)}")


_VARIANTS = {
    "dpmpp_2m": {
        ("dpmsolver++", 2): "dpmpp_2m",
        ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
        ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
    },
    "dpmpp_2s": {("dpmsolver++", 2): "dpmpp_2s"},
    "unipc": {("", 2): "unipc"},
    "deis": {("", 2): "deis"},
}
"""What (algorithm_type, solver_order) mean, by the sampler of the class."""
_LEADING_BY_DEFAULT = ("ddim", "ddpm", "pndm", "lcm", "tcd")


def sampler_from_scheduler_config(config: Mapping[str, Any]) -> tuple[str, str]:
    """(sampler, schedule) of a diffusers `scheduler_config.json`.

    Read are the class, `algorithm_type`, `solver_order`, `timestep_spacing` and the `use_*_sigmas` flags;
    prediction type and betas belong to `NoiseConfig`. Other keys are taken to have the values that Stable
    Diffusion models carry (`steps_offset` 1, `clip_sample` and `set_alpha_to_one` False).

    Raises:
        InvalidRequest: a class, or an order of DPM-Solver, that there is no sampler for.
    """
    sampler, _ = resolve_sampler(str(config.get("_class_name", "")))
    if sampler in _VARIANTS:
        kind = config.get("algorithm_type", "dpmsolver++") if sampler.startswith("dpmpp") else ""
        order = config.get("solver_order", 2)
        if (kind, order) not in _VARIANTS[sampler]:
            raise InvalidRequest(
                "sampler", f"there is none for {sampler} with {kind or 'solver'} of order {order}"
            )
        sampler = _VARIANTS[sampler][kind, order]
    spacing = config.get("timestep_spacing") or ("leading" if sampler in _LEADING_BY_DEFAULT else "linspace")
    curve = _curve(config)
    if curve is None:
        return sampler, resolve_schedule(spacing)
    return sampler, resolve_schedule(curve if spacing == "linspace" else f"{spacing}_{curve}")


def states_schedule(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config names a schedule, so that diffusers' `from_config` keeps it in another class."""
    return bool(config.get("timestep_spacing")) or _curve(config) is not None


def _curve(config: Mapping[str, Any]) -> str | None:
    return next((c for c in CURVES if config.get(f"use_{c}_sigmas")), None)
