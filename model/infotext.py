"""Generation parameters as the text that AUTOMATIC1111 writes into its pictures and Civitai shows.

    a red fox, watercolor
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Version: diffray 0.1.0

Adapters are `<lora:name:weight>` tags behind the prompt (`prompt_adapters` takes them out again), and their hashes
a pair of the last line.

Names, order and quoting follow its `infotext_utils.py` and `processing.py` (1.10). The form is lossy: outer
white space is stripped, and a prompt with a line that starts with "Negative prompt:" splits there. What must
come back exactly is kept beside it as JSON, see `encoding.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version

from .adapters.choices import adapter_tags
from .errors import InvalidRequest
from .request import ImageRequest
from .sampling.sampler_names import resolve_sampler, resolve_schedule

_VERSION = f"diffray {version('diffray')}"

SAMPLER_LABELS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""AUTOMATIC1111's label of each sampler; the usual one where it has none (2S, DDPM, DEIS, TCD)."""

SCHEDULE_LABELS = {
    "leading": "DDIM",
    "linspace": "Uniform",
    "trailing": "SGM Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ays": "Align Your Steps",
    "kl_optimal": "KL Optimal",
}
"""AUTOMATIC1111's label of the nearest schedule: it does not tell apart where diffusers' curves end."""

_UPSCALERS = {"latent": "Latent", "latent-nearest": "Latent (nearest)", "lanczos": "Lanczos"}
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A "Key: value" of the last line, as AUTOMATIC1111 reads it."""
_NEGATIVE = "Negative prompt:"


def infotext(
    request: ImageRequest,
    *,
    model: str | None = None,
    model_hash: str | None = None,
    adapter_hashes: Mapping[str, str] | None = None,
) -> str:
    """The parameters of a resolved request.

    Args:
        request: as the engine resolved it; what it leaves open is left out.
        model: the checkpoint's name.
        model_hash: SHA-256 of its file; the first ten digits are written.
        adapter_hashes: name to SHA-256 of the file of each adapter; those of the request's are written, ten digits
            of each, by which Civitai finds them. AUTOMATIC1111 itself hashes the file without its header.
    """
    sampler, schedule = _sampler_labels(request)
    pairs = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model hash": model_hash[:10] if model_hash else None,
        "Model": model or None,
        "Denoising strength": request.hires_strength if request.hires_scale else request.strength,
        "Clip skip": request.clip_skip + 1 if request.clip_skip else None,
        "RNG": "CPU",
        "Eta": request.eta,
        **(_hires(request) if request.hires_scale else {}),
        "Lora hashes": _lora_hashes(request, adapter_hashes or {}),
        "Version": _VERSION,
    }
    lines = [" ".join(filter(None, (request.prompt, adapter_tags(request.adapters))))]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE} {request.negative_prompt}")
    lines.append(
        ", ".join(f"{key}: {_quoted(_shown(value))}" for key, value in pairs.items() if value is not None)
    )
    return "\n".join(lines).strip()


def parse_infotext(text: str) -> dict[str, str]:
    """What an infotext says: "Prompt", "Negative prompt", and every pair of its last line as it stands there.

    Reads what AUTOMATIC1111 and its relatives write. The last line counts as parameters if it has three
    pairs or more, else as a part of the prompt. Never raises.
    """
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            current, line = "Negative prompt", line.removeprefix(_NEGATIVE).strip()
        prompts[current].append(line)
    return {name: "\n".join(part) for name, part in prompts.items()} | {k: _unquoted(v) for k, v in pairs}


def _sampler_labels(request: ImageRequest) -> tuple[str | None, str | None]:
    """Labels of sampler and schedule; names that only the model's owner knows stay as they are."""
    if request.sampler is None:
        return None, None
    try:
        sampler, implied = resolve_sampler(request.sampler)
        schedule = implied or (resolve_schedule(request.schedule, sampler) if request.schedule else None)
    except InvalidRequest:
        return request.sampler, request.schedule
    if schedule is None or request.sigmas is not None:
        return SAMPLER_LABELS[sampler], None
    known = schedule if schedule in SCHEDULE_LABELS else schedule.partition("_")[2]  # "leading_karras"
    return SAMPLER_LABELS[sampler], SCHEDULE_LABELS[known]


def _lora_hashes(request: ImageRequest, hashes: Mapping[str, str]) -> str | None:
    names = [choice.name for choice in request.adapters if choice.name in hashes]
    return ", ".join(f"{name}: {hashes[name][:10]}" for name in names) or None


def _hires(request: ImageRequest) -> dict[str, object]:
    return {
        "Hires upscale": request.hires_scale,
        "Hires steps": request.hires_steps,
        "Hires upscaler": _UPSCALERS[request.hires_upscale],
    }


def _shown(value: object) -> str:
    """Numbers without a needless ".0", as AUTOMATIC1111's forms give them."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quoted(text: str) -> str:
    """JSON text where a separator is in it (or where it would be taken for JSON text when read)."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n]|^"', text) else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text
