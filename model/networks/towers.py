"""CLIP text towers from tensor names and shapes, under Hugging Face's or OpenCLIP's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..config import TextConfig
from ..errors import CheckpointError
from ..weights.detect import HEAD_DIM, Json, Shapes, check_config, count_while
from ..weights.keys import TEXT_MODEL

TEXT_FIXED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (1e-5,),
}


@dataclass(frozen=True, slots=True)
class TextUse:
    """What a family takes from a text tower; see `TextConfig`. `pad` None is the end-of-text id."""

    layer: int
    final_norm: bool
    pad: int | None


@dataclass(frozen=True, slots=True)
class Tower:
    """A text tower found in a file: its tensors, whose names they have, and their prefix in the file."""

    shapes: Shapes
    style: Literal["clip", "openclip"]
    prefix: str


def detect_text(
    tower: Tower, use: TextUse, config: Json | None, *, special: tuple[int, int] | None, drop: int = 0
) -> TextConfig:
    """The shape of a text tower.

    Args:
        tower: the tensors as stored.
        use: the family's choice of hidden state.
        config: `text_encoder/config.json`, where there is one.
        special: (start, end) ids of the checkpoint's own tokenizer; None takes the last two rows, as in CLIP.
        drop: blocks at the end of the tower that the family never runs (SD2's OpenCLIP: 1).

    Raises:
        CheckpointError: not a CLIP text tower, or `config` contradicts the shapes.
    """
    shapes, stated, openclip = tower.shapes, config or {}, tower.style == "openclip"
    bare = "" if openclip or not any(key.startswith(TEXT_MODEL) for key in shapes) else TEXT_MODEL
    tokens = "token_embedding.weight" if openclip else f"{bare}embeddings.token_embedding.weight"
    positions = "positional_embedding" if openclip else f"{bare}embeddings.position_embedding.weight"
    block, inner = (
        ("transformer.resblocks.{}.", "mlp.c_fc") if openclip else (f"{bare}encoder.layers.{{}}.", "mlp.fc1")
    )
    for key in (tokens, positions, f"{block.format(0)}{inner}.weight"):
        if len(shapes.get(key, ())) != 2:
            raise CheckpointError(f"no CLIP text encoder: {tower.prefix}{key} is missing")
    (vocab, hidden), layers = (
        shapes[tokens],
        count_while(lambda n: f"{block.format(n)}{inner}.weight" in shapes),
    )
    if not openclip:
        projection = shapes.get("text_projection.weight", (None,))[0]
    else:
        projection = None if drop else shapes.get("text_projection", (None, None))[1]
    intermediate = shapes[f"{block.format(0)}{inner}.weight"][0]
    facts = {
        "hidden_size": hidden,
        "num_hidden_layers": layers - drop,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }
    check_config(config, "text encoder config.json", TEXT_FIXED, facts)
    heads = stated.get("num_attention_heads") or max(hidden // HEAD_DIM, 1)
    if not isinstance(heads, int) or hidden % heads:
        raise CheckpointError(f"text encoder: width {hidden} does not divide into {heads!r} heads")
    bos, eos = special or (vocab - 2, vocab - 1)
    return TextConfig(
        hidden=hidden,
        layers=layers - drop,
        heads=heads,
        intermediate=intermediate,
        positions=shapes[positions][0],
        vocab=vocab,
        activation=stated.get("hidden_act") or ("gelu" if openclip else "quick_gelu"),
        projection_dim=projection,
        layer=use.layer,
        final_norm=use.final_norm,
        pad_id=eos if use.pad is None else use.pad,
        bos_id=bos,
        eos_id=eos,
    )
