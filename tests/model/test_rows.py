"""Rows: whatever the number of branches, the bits are those of calls of the full size."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffray.model.conditioning import Branch
from diffray.model.rows import PROOFS, Rows

SHAPE = (4, 2, 3)


class Kernel:
    """A network whose results depend on the number of rows as `regime` says, and that notes its calls."""

    def __init__(self, regime: Callable[[int], float]) -> None:
        self.regime = regime
        self.sizes: Counter[int] = Counter()

    def __call__(self, x: Tensor, times: Tensor, context: Tensor, *rest: Tensor | None) -> Tensor:
        self.sizes[len(x)] += 1
        assert len(x) == len(times) == len(context)
        return (
            x * times[:, None, None, None]
            + context.mean(dim=(1, 2))[:, None, None, None]
            + self.regime(len(x))
        )


def ask(rows: Rows, count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    branches = [Branch(torch.randn((5, 6), generator=random)) for _ in range(count)]
    return rows(torch.randn((count, *SHAPE), generator=random), torch.arange(count) + 1.0, branches)


@pytest.mark.parametrize(
    ("regime", "used"),
    [
        (lambda n: 0.0, {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 7: 8, 11: 12, 16: 16, 20: 16 + 4}),
        (lambda n: 0.0 if n >= 4 else 1e-7, {1: 4, 2: 4, 3: 4, 5: 8, 13: 16}),
        (lambda n: 0.0 if n % 8 == 0 else 1e-7, {1: 8, 2: 8, 6: 8, 9: 16, 16: 16}),
        (lambda n: n * 1e-7, {1: 16, 2: 16, 8: 16, 17: 32}),
    ],
    ids=["all alike", "from 4", "by eights", "all different"],
)
def test_shorter_calls_give_the_same_bits_or_are_not_used(
    regime: Callable[[int], float], used: dict[int, int]
) -> None:
    kernel = Kernel(regime)
    rows, padded = Rows(kernel, 16), Rows(Kernel(regime), 16, shorten=False)
    for seed in range(4 * PROOFS + 1):  # every candidate is tried
        for count in used:
            assert torch.equal(ask(rows, count, seed), ask(padded, count, seed))
    assert rows.calls == padded.calls  # proofs do not count
    for count, computed in used.items():
        kernel.sizes.clear()
        ask(rows, count)
        assert sum(size * times for size, times in kernel.sizes.items()) == computed


def test_trust_is_per_shape() -> None:
    kernel = Kernel(lambda n: 0.0)
    rows = Rows(kernel, 8)
    for seed in range(PROOFS):
        ask(rows, 2, seed)
    kernel.sizes.clear()
    ask(rows, 2)
    assert kernel.sizes == {2: 1}
    kernel.sizes.clear()
    rows(torch.randn((2, 4, 9, 9)), torch.ones(2), [Branch(torch.zeros(5, 6))] * 2)
    assert kernel.sizes == {8: 1, 2: 1}


def test_values_that_are_not_finite_do_not_refute() -> None:
    kernel = Kernel(lambda n: float("nan"))
    rows = Rows(kernel, 8)
    for seed in range(PROOFS):
        assert ask(rows, 1, seed).isnan().all()
    kernel.sizes.clear()
    ask(rows, 1)
    assert kernel.sizes == {1: 1}


def test_running_out_of_memory_is_logged_and_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    most = [16]

    def regime(n: int) -> float:
        if n > most[0]:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return 0.0 if n >= most[0] else 1.0

    kernel = Kernel(regime)
    rows = Rows(kernel, 16)
    ask(rows, 12)
    most[0] = 8
    with caplog.at_level(logging.WARNING, logger="diffray.model"):
        halved = ask(rows, 12)
    assert "8 rows" in caplog.text
    assert rows.rows_of(torch.zeros(SHAPE)) == 8
    assert rows.rows_of(torch.zeros(4, 2, 2)) == 16
    assert torch.equal(halved, ask(Rows(Kernel(regime), 8, shorten=False), 12))
