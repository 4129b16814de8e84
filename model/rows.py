"""Network calls of a fixed number of rows, whatever the number of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .conditioning import Branch

if TYPE_CHECKING:
    from .weights.load import Model

PROOFS = 3
"""Calls that must agree bit for bit before a shorter call is trusted."""
REFUTED = -1
CHANGE = "the last bits of images may differ from those made before (see Result.rows)"

ALLOCATORS = ("you tried to allocate", "MPS backend out of memory")
"""What errors of the CPU's and of Apple's have in them."""

log = logging.getLogger("diffray.model")
LARGE = 1_500_000_000
"""Parameters above which a network is of SDXL's size, not of SD 1's."""


class Rows:
    """Runs the UNet on any number of branches, as if always in calls of exactly `size` rows.

    A row's bits may depend on how many rows it is computed with: kernels are chosen by shape. So short calls
    are padded to `size`, or to fewer rows where this device was seen to give the same bits: a shorter call is
    first made beside the padded one, and trusted for its shapes once `PROOFS` such pairs were equal. On many
    CPUs a lone image then costs 4 rows instead of 16.

    Args:
        unet: the network, compiled or not.
        size: rows of one call. Running out of memory halves them for good for latents of that shape, which is
            logged and which `Result.rows` tells: the last bits of images change with it.
        shorten: whether shorter calls are tried; a compiled network would be compiled for each.

    Attributes:
        calls: network calls that images waited for, those made as a proof not counted.
    """

    def __init__(self, unet: Callable[..., Tensor], size: int, *, shorten: bool = True) -> None:
        self.unet = unet
        self.size = size
        self.shorten = shorten
        self.calls = 0
        self._agreed: dict[tuple[object, ...], int] = {}
        self._halved: dict[torch.Size, int] = {}
        """Rows of a call for those shapes of latents that do not fit the memory at `size`."""

    def rows_of(self, latents: Tensor) -> int:
        """Rows of a call with latents of this shape [..., C, h, w]."""
        return self._halved.get(latents.shape[-3:], self.size)

    def __call__(self, scaled: Tensor, times: Tensor, branches: Sequence[Branch]) -> Tensor:
        """Raw outputs [N, C, h, w] float32 for scaled latents [N, C, h, w], timesteps [N] and N branches.

        Raises:
            RuntimeError: a single row does not fit (`is_out_of_memory`).
        """
        while True:
            size = self.rows_of(scaled)
            try:
                starts = range(0, len(branches), size)
                return torch.cat([self._part(scaled, times, branches, start, size) for start in starts])
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self._halved[scaled.shape[1:]] = size // 2
            torch.cuda.empty_cache()
            shape = "x".join(map(str, scaled.shape[1:]))
            log.warning(
                "out of memory: %d rows a network call for latents %s from now on; %s",
                size // 2,
                shape,
                CHANGE,
            )

    def _part(
        self, scaled: Tensor, times: Tensor, branches: Sequence[Branch], start: int, size: int
    ) -> Tensor:
        """The outputs of at most `size` rows from `start`."""
        self.calls += 1
        own = branches[start : start + size]
        part = slice(start, start + len(own))

        def call(rows: int) -> Tensor:
            return self._call(scaled[part], times[part], own, rows)

        shapes = (scaled.shape[1:], own[0].context.shape, size)
        for rows in self._shorter(len(own), size):
            agreed = self._agreed.get((rows, shapes), 0)
            if agreed == REFUTED:
                continue
            if agreed == PROOFS:
                return call(rows)[: len(own)]
            whole, short = call(size), call(rows)
            same = torch.equal(whole[:rows].view(torch.int32), short.view(torch.int32))
            self._agreed[rows, shapes] = agreed + 1 if same else REFUTED
            return whole[: len(own)]
        return call(size)[: len(own)]

    def _shorter(self, count: int, size: int) -> list[int]:
        """Sizes below `size` that hold `count` rows; kernels work on rows by fours, at the finest."""
        if not self.shorten:
            return []
        return [rows for rows in (1, 2, *range(4, size, 4)) if count <= rows < size]

    def _call(self, scaled: Tensor, times: Tensor, own: Sequence[Branch], rows: int) -> Tensor:
        """Outputs of `rows` rows: these, then the first again, which is finite."""
        padding = rows - len(own)
        padded = [*own, *[own[0]] * padding]

        def filled(values: Tensor) -> Tensor:
            return torch.cat([values, values[:1].expand(padding, *values.shape[1:])]) if padding else values

        x, extra = filled(scaled), _stack([branch.extra for branch in padded])
        output = self.unet(
            x if extra is None else torch.cat([x, extra], dim=1),
            filled(times),
            torch.stack([branch.context for branch in padded]),
            _stack([branch.added for branch in padded]),
            _stack([branch.label for branch in padded]),
            _stack([branch.guidance for branch in padded]),
        )
        return output.float()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that the device does not have; some of torch's allocators say so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None


def default_batch_size(model: Model) -> int:
    """Images per batch where throughput has levelled off: 16 for SD 1 and 2 sized networks on an accelerator,
    8 for larger ones; on a CPU 8 for small networks and 1 for real ones, which are bound by arithmetic."""
    parameters = _parameters(model)
    if model.device.type == "cpu":
        return 8 if parameters < 50_000_000 else 1
    return 16 if parameters < LARGE else 8


def default_rows(model: Model, batch_size: int) -> int:
    """Rows per network call, two for each image with guidance, where throughput has levelled off.

    On a CPU 16, with a single thread 8 (benchmarks/README.md has the figures). On an accelerator SD 1 and 2
    take all images at once; of SDXL, 8 rows keep it busy, and a lone image is not padded to 16.
    """
    most = 2 * batch_size
    if model.device.type == "cpu":
        return min(most, 8 if torch.get_num_threads() == 1 else 16)
    return most if _parameters(model) < LARGE else min(most, 8)


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.unet.parameters())
