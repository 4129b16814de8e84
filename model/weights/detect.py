"""Network configs from tensor names and shapes, in either layout; JSON configs only fill what shapes hide.

Nothing assumes the dimensions of a published model. What shapes cannot tell: the number of attention heads
(1x1-convolution projections go with 8 heads, linear ones with heads 64 wide, the x4 upscaler has 8) and of
normalisation groups (32), unless a config says so. Where a config and the shapes disagree, loading stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..config import UNetConfig, VAEConfig
from ..errors import CheckpointError
from .checkpoint import Layout
from .keys import Shape

Shapes = Mapping[str, Shape]
Json = Mapping[str, Any]

HEADS = 8
HEAD_DIM = 64
GROUPS = 32

UNET_FIXED: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Config values that change the arithmetic without changing a shape, and what this UNet implements."""
VAE_FIXED: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One resnet of a UNet and the transformer after it (its path exists or not)."""

    resnet: str
    attention: str


# UNet ------------------------------------------------------------------------------------------------------


def detect_unet(
    shapes: Shapes, layout: Layout, config: Json | None = None, *, xl: bool = False
) -> UNetConfig:
    """The shape of a UNet.

    Args:
        shapes: its tensors, without the part's prefix.
        layout: whose names they are.
        config: `unet/config.json`, where there is one.
        xl: what a single file's `label_emb` means: pooled text and sizes, else an image embedding (unCLIP).

    Raises:
        CheckpointError: not a text-conditioned UNet, or `config` contradicts the shapes.
    """
    single = layout == "single"
    down, mid, up = _single_layers(shapes) if single else _folder_layers(shapes)
    first, last = ("input_blocks.0.0", "out.2") if single else ("conv_in", "conv_out")
    if f"{first}.weight" not in shapes or f"{last}.weight" not in shapes or not down[0]:
        raise CheckpointError(f"no UNet: {first}.weight, {last}.weight or the first block is missing")
    if len(up) != len(down):
        raise CheckpointError(f"UNet: {len(down)} levels down, {len(up)} levels up")
    conv = "in_layers.2" if single else "conv1"
    channels = tuple(shapes[f"{level[0].resnet}.{conv}.weight"][0] if level else 0 for level in down)
    depths = {layer: _depth(shapes, layer.attention) for level in (*down, mid, *up) for layer in level}
    attended = [layer for layer, depth in depths.items() if depth]
    if not attended:
        raise CheckpointError("UNet: no cross-attention, so it cannot be guided by text")
    block = f"{attended[0].attention}.transformer_blocks.0"
    context = shapes.get(f"{block}.attn2.to_k.weight", (0, 0))[-1]
    linear = len(shapes.get(f"{attended[0].attention}.proj_in.weight", ())) == 2
    fields = dict(
        in_channels=shapes[f"{first}.weight"][1],
        out_channels=shapes[f"{last}.weight"][0],
        channels=channels,
        down=tuple(tuple(depths[layer] for layer in level) for level in down),
        mid_resnets=len(mid),
        mid_depth=(depths[mid[0]] or None) if mid else None,
        up=tuple(tuple(depths[layer] for layer in level) for level in up),
        context_dim=context,
        linear_projection=linear,
        cross_attention_only=_cross_only(shapes, down, mid, up, channels, context, config or {}),
        guidance_dim=shapes.get(
            f"{'time_embed' if single else 'time_embedding'}.cond_proj.weight", (0, None)
        )[1],
        **_added(shapes, single, xl),
    )
    check_config(config, "unet/config.json", UNET_FIXED, _unet_facts(fields))
    fields["norm_groups"] = groups = int((config or {}).get("norm_num_groups") or GROUPS)
    fields["heads"] = heads = _heads(config or {}, channels, linear, fields["class_count"] is not None)
    for c, h in zip(channels, heads, strict=True):
        if c < 1 or c % groups or c % h:
            raise CheckpointError(f"UNet: {c} channels do not divide into {groups} groups and {h} heads")
    return UNetConfig(**fields)


Levels = list[list[_Layer]]


def _single_layers(shapes: Shapes) -> tuple[Levels, list[_Layer], Levels]:
    def present(path: str) -> bool:
        return f"{path}.in_layers.2.weight" in shapes

    down: Levels = [[]]
    for n in count(1):
        path = f"input_blocks.{n}"
        if f"{path}.0.op.weight" in shapes:
            down.append([])
        elif present(f"{path}.0"):
            down[-1].append(_Layer(f"{path}.0", f"{path}.1"))
        else:
            break
    mid = [_Layer(f"middle_block.{n}", "middle_block.1") for n in range(3) if present(f"middle_block.{n}")]
    up: Levels = [[]]
    for n in count():
        path = f"output_blocks.{n}"
        if not present(f"{path}.0"):
            break
        up[-1].append(_Layer(f"{path}.0", f"{path}.1"))
        if f"{path}.1.conv.weight" in shapes or f"{path}.2.conv.weight" in shapes:
            up.append([])
    return down, mid, up[::-1]


def _folder_layers(shapes: Shapes) -> tuple[Levels, list[_Layer], Levels]:
    def layers(block: str) -> list[_Layer]:
        found: list[_Layer] = []
        for n in count():
            if f"{block}.resnets.{n}.conv1.weight" not in shapes:
                return found
            found.append(_Layer(f"{block}.resnets.{n}", f"{block}.attentions.{n}"))
        return found

    def levels(side: str) -> Levels:
        found: Levels = []
        while block := layers(f"{side}_blocks.{len(found)}"):
            found.append(block)
        return found or [[]]

    mid = [_Layer(layer.resnet, "mid_block.attentions.0") for layer in layers("mid_block")]
    return levels("down"), mid, levels("up")[::-1]


def _depth(shapes: Shapes, attention: str) -> int:
    return count_while(lambda n: f"{attention}.transformer_blocks.{n}.norm1.weight" in shapes)


def count_while(present: Callable[[int], bool]) -> int:
    """How many of 0, 1, 2, ... are present in a row."""
    return next(n for n in count() if not present(n))


def _cross_only(
    shapes: Shapes,
    down: Levels,
    mid: list[_Layer],
    up: Levels,
    channels: tuple[int, ...],
    context: int,
    config: Json,
) -> tuple[bool, ...]:
    """Per level: attn1 reads the text. Where text and level are equally wide, only a config can tell."""
    stated = config.get("only_cross_attention", False)
    result = []
    for level, width in enumerate(channels):
        layers = [*down[level], *up[level], *(mid if level == len(channels) - 1 else [])]
        keys = [f"{layer.attention}.transformer_blocks.0.attn1.to_k.weight" for layer in layers]
        widths = {shapes[key][-1] for key in keys if key in shapes}
        if widths == {width} == {context}:
            result.append(bool(stated[level] if isinstance(stated, list) else stated))
        else:
            result.append(bool(widths) and widths != {width})
    return tuple(result)


def _added(shapes: Shapes, single: bool, xl: bool) -> dict[str, Any]:
    """The embedding added to the timestep's. A single file calls all three kinds `label_emb`."""
    none = {"added_dim": None, "added_kind": None, "class_count": None}
    if single:
        if "label_emb.weight" in shapes:
            return none | {"class_count": shapes["label_emb.weight"][0]}
        if "label_emb.0.0.weight" in shapes:
            dim = shapes["label_emb.0.0.weight"][1]
            return none | {"added_dim": dim, "added_kind": "text_time" if xl else "projection"}
        return none
    for key, kind in (("add_embedding", "text_time"), ("class_embedding", "projection")):
        if f"{key}.linear_1.weight" in shapes:
            return none | {"added_dim": shapes[f"{key}.linear_1.weight"][1], "added_kind": kind}
    if "class_embedding.weight" in shapes:
        return none | {"class_count": shapes["class_embedding.weight"][0]}
    return none


def _heads(config: Json, channels: tuple[int, ...], linear: bool, upscaler: bool) -> tuple[int, ...]:
    # diffusers calls the number of heads attention_head_dim; num_attention_heads wins if it is set.
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")
    if stated is None:
        wide = linear and not upscaler
        return tuple(max(c // HEAD_DIM, 1) if wide else HEADS for c in channels)
    values = stated if isinstance(stated, list) else [stated] * len(channels)
    if len(values) != len(channels) or not all(isinstance(v, int) and v > 0 for v in values):
        raise CheckpointError(
            f"unet/config.json: attention_head_dim {stated!r} does not fit {len(channels)} levels"
        )
    return tuple(values)


def _unet_facts(fields: Mapping[str, Any]) -> dict[str, object]:
    return {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "block_out_channels": list(fields["channels"]),
        "cross_attention_dim": fields["context_dim"],
        "use_linear_projection": fields["linear_projection"],
    }


# Autoencoder -----------------------------------------------------------------------------------------------

_VAE_LEVELS: Mapping[Layout, str] = {
    "single": "encoder.down.{}.block.{}.conv1.weight",
    "folder": "encoder.down_blocks.{}.resnets.{}.conv1.weight",
}


def detect_vae(
    shapes: Shapes, layout: Layout, config: Json | None = None, *, scale: float, force_upcast: bool
) -> VAEConfig:
    """The shape of an autoencoder; `scale` and `force_upcast` are its family's, used when no config says.

    Raises:
        CheckpointError: not a KL autoencoder, or `config` contradicts the shapes.
    """
    name, stated = _VAE_LEVELS[layout], config or {}
    levels = count_while(lambda n: name.format(n, 0) in shapes)
    if not levels or "encoder.conv_in.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        raise CheckpointError("no autoencoder: encoder or decoder tensors are missing")
    channels = tuple(shapes[name.format(n, 0)][0] for n in range(levels))
    latents, resnets = shapes["decoder.conv_in.weight"][1], count_while(lambda n: name.format(0, n) in shapes)
    facts = {"block_out_channels": list(channels), "latent_channels": latents, "layers_per_block": resnets}
    check_config(config, "vae/config.json", VAE_FIXED, facts)
    groups = int(stated.get("norm_num_groups") or GROUPS)
    if any(c < 1 or c % groups for c in channels):
        raise CheckpointError(f"VAE: channels {channels} do not divide into {groups} groups")
    return VAEConfig(
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=latents,
        channels=channels,
        resnets=resnets,
        quant_conv="quant_conv.weight" in shapes,
        scale=_number(stated, "scaling_factor", scale),
        shift=_number(stated, "shift_factor", 0.0),
        latents_mean=_floats(stated, "latents_mean", latents),
        latents_std=_floats(stated, "latents_std", latents),
        force_upcast=bool(stated.get("force_upcast", force_upcast)),
        norm_groups=groups,
    )


def _number(config: Json, name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"vae/config.json: {name}: got {value!r}, allowed is a number")
    return float(value)


def _floats(config: Json, name: str, length: int) -> tuple[float, ...] | None:
    values = config.get(name)
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != length
        or not all(isinstance(v, (int, float)) for v in values)
    ):
        raise CheckpointError(f"vae/config.json: {name}: got {values!r}, allowed are {length} numbers")
    return tuple(map(float, values))


def check_config(
    config: Json | None, name: str, fixed: Mapping[str, tuple[object, ...]], facts: Mapping[str, object]
) -> None:
    """Raises when a config asks for arithmetic that is not implemented, or contradicts the shapes."""
    for field, allowed in fixed.items():
        if config is not None and field in config and config[field] not in allowed:
            options = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{name}: {field} is {config[field]!r}, supported is {options}")
    for field, found in facts.items():
        if config is not None and config.get(field) is not None and config[field] != found:
            raise CheckpointError(f"{name}: {field} is {config[field]!r}, but the tensors say {found!r}")
