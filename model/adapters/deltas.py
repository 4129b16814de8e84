"""What each kind of adapter adds to a weight, dense, from its factors.

A kind is a row of `KINDS`: the factors it must and may have, and how they make one tensor [out, in, ...] before
the scale alpha / rank. The shapes are checked by running the same arithmetic on the meta device, so that no
second description of them can differ.

Reference: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2022 (FedPara, which LoHa is), Yeh et al. 2023 (LyCORIS: LoCon,
LoHa, LoKr), Liu et al. 2024 (DoRA); tensor names of kohya-ss/sd-scripts and KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..weights.keys import Shape

Factors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of `KINDS`.

    Attributes:
        name: for messages.
        needs: sets of factors, one of which must be there.
        build: factors and the weight's shape to the unscaled change, of as many elements.
        inner: factors whose first axis is the rank, the first that is there; without one alpha has no effect.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    build: Callable[[Factors, Shape], Tensor]
    inner: tuple[str, ...] = ()


BESIDE = frozenset(("alpha", "dora_scale", "magnitude", "diff_b"))
"""What may stand beside the factors of every kind."""


def kind_of_factors(leaves: Collection[str]) -> Kind | None:
    """The kind of a module's factors; None where only the bias changes.

    Raises:
        CheckpointError: no kind has exactly these.
    """
    own = frozenset(leaves) - BESIDE
    if not own and "diff_b" in leaves:
        return None
    for kind in KINDS:
        if own in kind.needs:
            return kind
    raise CheckpointError(
        f"got {', '.join(sorted(leaves))}, which is no whole LoRA, LoHa, LoKr or full change"
    )


def rank(kind: Kind, shapes: Mapping[str, Shape]) -> int | None:
    """The inner dimension that alpha is divided by, from the shapes of the factors; None without one."""
    return next((shapes[leaf][0] for leaf in kind.inner if leaf in shapes), None)


def dense(kind: Kind, factors: Factors, scale: float, base: Tensor) -> Tensor:
    """What is added to the weight `base` at adapter weight 1, float32 like all arguments.

    Args:
        scale: alpha / rank.
    """
    change = kind.build(factors, tuple(base.shape)).reshape(base.shape) * scale
    for leaf in ("dora_scale", "magnitude"):
        if leaf in factors:
            change = _renormed(base + change, factors[leaf], rows=leaf == "magnitude") - base
    return change


def check_shapes(kind: Kind | None, shapes: Mapping[str, Shape], weight: Shape, bias: Shape | None) -> None:
    """Whether factors of these shapes make a change of the weight's shape, and the bias' if one is among them.

    Raises:
        CheckpointError: they do not.
    """
    if 0 in (side for shape in shapes.values() for side in shape):
        raise CheckpointError(f"{_shown(shapes)}: allowed is a rank of at least 1")
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise CheckpointError(f"alpha {list(shapes['alpha'])}, allowed is one number")
    if "diff_b" in shapes and shapes["diff_b"] != bias:
        wanted = "this module has no bias" if bias is None else f"wanted {list(bias)}"
        raise CheckpointError(f"diff_b {list(shapes['diff_b'])}, {wanted}")
    if kind is None:
        return
    try:
        factors = {leaf: torch.empty(shape, device="meta") for leaf, shape in shapes.items()}
        change = kind.build(factors, weight)
        if squeezed(tuple(change.shape)) != squeezed(weight):
            raise CheckpointError(f"{_shown(shapes)} make {list(change.shape)}, wanted {list(weight)}")
        dense(kind, factors, 1.0, torch.empty(weight, device="meta"))
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{_shown(shapes)} do not fit {list(weight)}") from error


def squeezed(shape: Shape) -> Shape:
    """A shape without trailing ones: a linear weight and that of a 1x1 convolution have the same."""
    end = len(shape)
    while end and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


def _lora(factors: Factors, shape: Shape) -> Tensor:
    down, up = factors["down"], factors["up"]
    if "mid" in factors:  # Tucker: a small convolution between two 1x1 ones
        return torch.einsum("om,mnkl,ni->oikl", up.flatten(1), factors["mid"], down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(factors: Factors, shape: Shape) -> Tensor:
    halves = []
    for half in ("1", "2"):
        a, b = factors[f"hada_w{half}_a"], factors[f"hada_w{half}_b"]
        middle = factors.get(f"hada_t{half}")
        halves.append(a @ b if middle is None else _tucker(middle, a, b))
    first, second = halves
    if first.shape != second.shape or first.shape[0] != shape[0]:
        raise ValueError("the halves differ, or stand across")  # and would be broadcast or reshaped
    return (first * second).reshape(shape)


def _lokr(factors: Factors, shape: Shape) -> Tensor:
    first = _whole(factors, "lokr_w1")
    if "lokr_t2" in factors:
        second = _tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
    else:
        second = _whole(factors, "lokr_w2")
    kernel = shape[2:]
    second = second.reshape(second.shape[0], -1, *kernel).contiguous()
    return torch.kron(first.reshape(*first.shape, *[1] * len(kernel)), second)


def _full(factors: Factors, shape: Shape) -> Tensor:
    return factors["diff"]


def _whole(factors: Factors, name: str) -> Tensor:
    """A factor that may itself be stored as two."""
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


def _tucker(middle: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[out, in, kh, kw] from a core [r, r, kh, kw] and its sides [r, out] and [r, in] (LyCORIS)."""
    return torch.einsum("mnkl,ni,mo->oikl", middle, b, a)


def _renormed(weight: Tensor, magnitude: Tensor, *, rows: bool) -> Tensor:
    """`weight` with the norm of each output row, or of each input column, as `magnitude` says (DoRA).

    The paper's columns are peft's rows, torch storing the transpose; LyCORIS has had both.
    """
    rows = rows or magnitude.dim() < 2 or magnitude.shape[0] == weight.shape[0]
    axes = [axis for axis in range(weight.dim()) if axis != (0 if rows else 1)]
    norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    if magnitude.numel() != norm.numel():
        raise ValueError("as many magnitudes as rows or columns")
    return weight * (magnitude.reshape(norm.shape) / norm.clamp(min=torch.finfo(torch.float32).tiny))


def _shown(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{leaf} {list(shape)}" for leaf, shape in sorted(shapes.items()) if leaf != "alpha")


def _sets(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


KINDS = (
    Kind("LoRA", _sets("down up", "down up mid"), _lora, inner=("down",)),
    Kind(
        "LoHa",
        _sets(
            "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
            "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        ),
        _loha,
        inner=("hada_w1_b",),
    ),
    Kind(
        "LoKr",
        _sets(
            *(
                f"{first} {second}"
                for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
                for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
            )
        ),
        _lokr,
        inner=("lokr_w2_b", "lokr_w1_b"),
    ),
    Kind("full", _sets("diff"), _full),
)
