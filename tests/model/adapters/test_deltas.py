"""Every kind of change against peft's layers, and against the papers' formulas where peft has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from diffray.model.adapters.deltas import check_shapes, dense, kind_of_factors, rank
from diffray.model.errors import CheckpointError

OUT, IN, RANK, ALPHA = 12, 8, 4, 6.0
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "conv1x1": lambda: nn.Conv2d(IN, OUT, 1),
    "conv3x3": lambda: nn.Conv2d(IN, OUT, 3),
}


def change(factors: dict[str, Tensor], base: Tensor, alpha: float = ALPHA) -> Tensor:
    """Ours; the shapes are checked as at loading."""
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in factors.items()}
    kind = kind_of_factors(shapes)
    assert kind is not None
    check_shapes(kind, shapes, tuple(base.shape), None)
    inner = rank(kind, shapes)
    return dense(kind, factors, alpha / inner if inner else 1.0, base)


def peft_change(config: Any, layer: nn.Module, names: dict[str, str]) -> tuple[dict[str, Tensor], Tensor]:
    """Random factors in a peft adapter of `layer` by our names, and what merging it adds to the weight."""
    torch.manual_seed(1)
    base = layer.weight.detach().clone()  # type: ignore[union-attr, operator]
    model = peft.get_peft_model(nn.Sequential(layer), config)
    own = dict(model.named_parameters())
    factors = {}
    for name, parameter in own.items():
        if not parameter.requires_grad:
            continue
        leaf = next(ours for theirs, ours in names.items() if f".{theirs}." in name)
        parameter.data = (
            torch.rand_like(parameter) + 0.5 if leaf == "magnitude" else torch.randn_like(parameter)
        )
        factors[leaf] = parameter.data.clone()
    merged = model.merge_and_unload()
    return factors, merged[0].weight.detach() - base


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_lora(layer: str, dora: bool) -> None:
    own = LAYERS[layer]()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=dora)
    names = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
    base = own.weight.detach().clone()
    factors, wanted = peft_change(config, own, names)
    assert ("magnitude" in factors) == dora
    torch.testing.assert_close(change(factors, base), wanted, rtol=1e-5, atol=1e-5)
    if dora:  # kohya's name and shape of the same thing
        factors["dora_scale"] = factors.pop("magnitude").reshape(OUT, *[1] * (base.dim() - 1))
        torch.testing.assert_close(change(factors, base), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_loha(layer: str, tucker: bool) -> None:
    own = LAYERS[layer]()
    config = peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["0"], use_effective_conv2d=tucker)
    factors, wanted = peft_change(
        config,
        own,
        {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    )
    assert ("hada_t1" in factors) == (tucker and layer == "conv3x3")
    torch.testing.assert_close(change(factors, torch.zeros_like(wanted)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"use_effective_conv2d": True}])
@pytest.mark.parametrize("rank_", [2, 100])  # 100: too large to be worth factors, so whole matrices
@pytest.mark.parametrize("layer", LAYERS)
def test_lokr(layer: str, rank_: int, options: dict[str, bool]) -> None:
    own = LAYERS[layer]()
    alpha = rank_ if rank_ == 100 else ALPHA
    config = peft.LoKrConfig(r=rank_, alpha=alpha, target_modules=["0"], decompose_factor=2, **options)
    leaves = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    factors, wanted = peft_change(config, own, {name: name for name in leaves})
    torch.testing.assert_close(change(factors, torch.zeros_like(wanted)), wanted, rtol=1e-4, atol=1e-4)


def test_tucker_lora_is_three_convolutions() -> None:
    """LoCon's definition: 1x1 down, a small one of the kernel's size, 1x1 up."""
    torch.manual_seed(0)
    down, mid = torch.randn(RANK, IN, 1, 1), torch.randn(RANK, RANK, 3, 3)
    up, x = torch.randn(OUT, RANK, 1, 1), torch.randn(1, IN, 5, 5)
    conv = nn.functional.conv2d
    wanted = conv(conv(conv(x, down), mid), up) * ALPHA / RANK
    found = change({"down": down, "mid": mid, "up": up}, torch.zeros(OUT, IN, 3, 3))
    torch.testing.assert_close(conv(x, found), wanted, rtol=1e-4, atol=1e-3)


def test_dora_by_input_columns() -> None:
    """LyCORIS' first form: m * (W + D) / ||W + D|| with one norm per input."""
    rng = np.random.default_rng(0)
    base, down, up = rng.normal(size=(OUT, IN)), rng.normal(size=(RANK, IN)), rng.normal(size=(OUT, RANK))
    scale = rng.uniform(0.5, 2, (1, IN))
    whole = base + up @ down * ALPHA / RANK
    wanted = scale * whole / np.sqrt((whole**2).sum(axis=0, keepdims=True)) - base
    factors = {"down": down, "up": up, "dora_scale": scale}
    found = change(
        {k: torch.tensor(v, dtype=torch.float32) for k, v in factors.items()}, torch.tensor(base).float()
    )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_dora_of_a_row_of_zeros_is_finite() -> None:
    factors = {"down": torch.zeros(1, IN), "up": torch.zeros(OUT, 1), "dora_scale": torch.ones(OUT, 1)}
    assert change(factors, torch.zeros(OUT, IN)).isfinite().all()


def test_a_full_change_and_a_linear_one_for_a_1x1_convolution() -> None:
    own = torch.randn(OUT, IN)
    assert torch.equal(change({"diff": own}, torch.zeros(OUT, IN, 1, 1))[..., 0, 0], own)
    up, down = torch.randn(OUT, RANK), torch.randn(RANK, IN)
    found = change({"up": up, "down": down}, torch.zeros(OUT, IN, 1, 1), alpha=RANK)
    torch.testing.assert_close(found[..., 0, 0], up @ down)


@pytest.mark.parametrize(
    "factors",
    [
        {"down": (RANK, IN), "up": (OUT, RANK + 1)},
        {"down": (RANK, IN + 1), "up": (OUT, RANK)},
        {"down": (0, IN), "up": (OUT, 0)},
        {"down": (RANK, OUT), "up": (IN, RANK)},
        {"down": (RANK, IN), "up": (OUT, RANK), "alpha": (2,)},
        {"down": (RANK, IN), "up": (OUT, RANK), "dora_scale": (3, 1)},
        {"down": (RANK, IN), "up": (OUT, RANK), "diff_b": (IN,)},
        {"down": (RANK, IN)},
        {"alpha": ()},
        {"down": (RANK, IN), "up": (OUT, RANK), "hada_t1": (1,)},
        {"hada_w1_a": (OUT, 1), "hada_w1_b": (1, IN), "hada_w2_a": (1, 1), "hada_w2_b": (1, IN)},
        {"hada_w1_a": (IN, 1), "hada_w1_b": (1, OUT), "hada_w2_a": (IN, 1), "hada_w2_b": (1, OUT)},
        {"lokr_w1": (2, 2), "lokr_w2": (5, 4)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (6, 2)},
        {"diff": (IN, OUT)},
        {"diff": (1, IN)},
    ],
)
def test_shapes_that_make_no_change_of_the_weight(factors: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError):
        check_shapes(kind_of_factors(factors), factors, (OUT, IN), (OUT,))
