"""Lists that AUTOMATIC1111's clients read: samplers, schedulers, upscalers, models, and what there is none of."""

from __future__ import annotations

from typing import Any

from diffray.model.infotext import SAMPLER_LABELS

from ..work import ModelCard
from .a1111_settings import title

SCHEDULERS: tuple[tuple[str, str], ...] = (
    ("automatic", "Automatic"),
    ("uniform", "Uniform"),
    ("karras", "Karras"),
    ("exponential", "Exponential"),
    ("polyexponential", "Polyexponential"),
    ("sgm_uniform", "SGM Uniform"),
    ("kl_optimal", "KL Optimal"),
    ("align_your_steps", "Align Your Steps"),
    ("simple", "Simple"),
    ("normal", "Normal"),
    ("ddim", "DDIM"),
    ("beta", "Beta"),
    ("turbo", "Turbo"),
)
"""AUTOMATIC1111's names and labels of the schedules that the engine has."""
UPSCALERS = ("None", "Lanczos", "Nearest")
LATENT_UPSCALE_MODES = ("Latent", "Latent (nearest)", "Latent (nearest-exact)")
CONSTANT: dict[str, Any] = {
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "extensions": [],
    "script-info": [],
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "memory": {"ram": {"error": "see /metrics"}, "cuda": {"error": "see /metrics"}},
    "cmd-flags": {"api": True, "nowebui": True},
}
"""Answers that never change, most of them empty; clients ask for them at the start."""


def samplers() -> list[dict[str, Any]]:
    """Every sampler by AUTOMATIC1111's label."""
    return [{"name": label, "aliases": [name], "options": {}} for name, label in SAMPLER_LABELS.items()]


def schedulers() -> list[dict[str, Any]]:
    """Every schedule."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in SCHEDULERS
    ]


def upscalers() -> list[dict[str, Any]]:
    """Ways to resize a picture."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        for name in UPSCALERS
    ]


def loras(card: ModelCard) -> list[dict[str, Any]]:
    """The adapters of one model; where their files are is nobody's business."""
    return [
        {"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in card.adapters
    ]


def models(cards: list[ModelCard]) -> list[dict[str, Any]]:
    """Every model; a hash is known once the file has been read."""
    return [
        {
            "title": title(card),
            "model_name": card.name,
            "hash": card.checksum[:10] or None,
            "sha256": card.checksum or None,
            "filename": card.name,
            "config": None,
        }
        for card in cards
    ]
