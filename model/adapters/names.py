"""Tensor names of adapter files, and the modules of the networks that they mean.

    lora_unet_input_blocks_1_1_proj_in.lora_down.weight   kohya: a module path with its dots made underscores,
    lora_unet_down_blocks_0_attentions_0_proj_in....      in the single file's names or in the folder's
    lora_te1_text_model_encoder_layers_0_mlp_fc1....      kohya, a text encoder
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight peft, and diffusers with `.lora.down.`
    unet....attn1.processor.to_q_lora.down.weight         diffusers before 0.22

An underscore may stand for a dot or for itself, so names are never taken apart: every module of the networks
(`keys.py` knows them all) gets the names that adapters may call it by. `spelled` makes the many spellings of a
factor one.

Reference: kohya-ss/sd-scripts, LyCORIS, diffusers and peft, ComfyUI's `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..config import TextConfig, UNetConfig
from ..weights.keys import TEXT_MODEL, Shape, renamed, unet_modules
from ..weights.parts import Part


class Place(NamedTuple):
    """A module of a model: the part it is in ("unet", "text_encoder", ...) and its folder path there."""

    part: str
    module: str


TOWER_NAMES: Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]] = {
    ("text_encoder",): (("te", "te1"),),
    ("text_encoder_2",): (("te2",),),
    ("text_encoder", "text_encoder_2"): (("te1",), ("te2",)),
}
"""What kohya calls the text encoders of a model, by those it has."""

_LEAVES = {
    "down": r"\.lora_down\.weight|\.lora(_linear_layer)?\.down\.weight|\.lora_A(\.\w+)?\.weight",
    "up": r"\.lora_up\.weight|\.lora(_linear_layer)?\.up\.weight|\.lora_B(\.\w+)?\.weight",
    "mid": r"\.lora_mid\.weight",
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
}
_PLAIN = (
    *("alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
_FORMS = [f"(?P<{leaf}>{form})" for leaf, form in _LEAVES.items()]
_FACTOR = re.compile(rf"(?:{'|'.join(_FORMS)}|\.(?P<plain>{'|'.join(_PLAIN)}))$")
_OLD_UNET = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_OLD_TEXT = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_WRAPPED = "base_model.model."

OTHERS: tuple[tuple[str, str], ...] = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|^lora_te3_|^text_encoder_3\.", "Stable Diffusion 3"),
    (r"^(lora_)?transformer[._]", "Stable Diffusion 3, Flux or another transformer"),
    (r"^lora_prior_", "Stable Cascade"),
    (r"motion_modules|temporal_", "a video model"),
)
"""Names that only adapters of other families have."""
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}
"""How wide the text is that a family's UNet reads."""


def spelled(key: str) -> tuple[str, str] | None:
    """The module name and the factor of a tensor name; None when it is no factor of a supported kind."""
    key = _OLD_UNET.sub(lambda m: f".to_{m[1] if m[1] != 'out' else 'out.0'}.lora.{m[2]}.weight", key)
    key = _OLD_TEXT.sub(lambda m: f".self_attn.{m[1]}_proj.lora.{m[2]}.weight", key)
    match = _FACTOR.search(key)
    if match is None:
        return None
    leaf = match["plain"] or next(leaf for leaf in _LEAVES if match[leaf])
    return key[: match.start()].removeprefix(_WRAPPED), leaf


def module_names(parts: Mapping[str, Part]) -> dict[str, Place]:
    """Every name that an adapter may call a module by.

    Args:
        parts: of the checkpoint, the text encoders in order.
    """
    names: dict[str, Place] = {}
    towers = tuple(name for name, part in parts.items() if isinstance(part.config, TextConfig))
    for name, part in parts.items():
        if isinstance(part.config, UNetConfig):
            names |= _unet_names(part.config, part.shapes)
        elif name in towers:
            own = TOWER_NAMES[towers][towers.index(name)]
            names |= _tower_names(name, own, part.shapes, alone=len(towers) == 1)
    return names


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _unet_names(config: UNetConfig, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Place]]:
    for rule in renamed(unet_modules(config), shapes, ""):
        module, single = _module(rule.folder[0]), _module(rule.file)
        place = Place("unet", module)
        for name in (module, f"unet.{module}", f"diffusion_model.{single}"):
            yield name, place
        for prefix, dotted in (("lora_unet", module), ("lora_unet", single), ("lycoris", module)):
            yield f"{prefix}_{dotted.replace('.', '_')}", place


def _tower_names(
    part: str, prefixes: Iterable[str], shapes: Mapping[str, Shape], *, alone: bool
) -> Iterator[tuple[str, Place]]:
    for module in map(_module, shapes):
        place = Place(part, module)
        for dotted in {module, module.removeprefix(TEXT_MODEL)}:
            yield f"{part}.{dotted}", place
        if alone:
            yield module, place
        for prefix in prefixes:
            yield f"lora_{prefix}_{module.replace('.', '_')}", place


def other_family(entries: Mapping[str, Shape], text_width: int) -> str | None:
    """The family that an adapter was made for, where that is not one whose text is `text_width` wide."""
    for pattern, family in OTHERS:
        search = re.compile(pattern).search
        if any(search(key) for key in entries):
            return family
    for key, shape in entries.items():
        found = spelled(key)
        if found and found[1] == "down" and re.search(r"attn2[._]to_k$", found[0]) and len(shape) == 2:
            return None if shape[1] == text_width else WIDTHS.get(shape[1])
    return None
