"""Network calls of a fixed number of rows, whatever the number of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .conditioning import Branch


class Rows:
    """Runs the UNet on any number of branches, in calls of exactly `size` rows; short calls are padded.

    A row's result may depend on how many rows it is computed with, so the number is always the same.

    Args:
        unet: the network, compiled or not.
        size: rows of one call. Running out of memory halves it for good.
    """

    def __init__(self, unet: Callable[..., Tensor], size: int) -> None:
        self.unet = unet
        self.size = size
        self.calls = 0

    def __call__(self, scaled: Tensor, times: Tensor, branches: Sequence[Branch]) -> Tensor:
        """Raw outputs [N, C, h, w] float32 for scaled latents [N, C, h, w], timesteps [N] and N branches.

        Raises:
            torch.cuda.OutOfMemoryError: a single row does not fit.
        """
        while True:
            try:
                starts = range(0, len(branches), self.size)
                return torch.cat([self._call(scaled, times, branches, start) for start in starts])
            except torch.cuda.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size //= 2
                torch.cuda.empty_cache()

    def _call(self, scaled: Tensor, times: Tensor, branches: Sequence[Branch], start: int) -> Tensor:
        """One call, on the rows from `start`; a short one is padded with its first row, which is finite."""
        self.calls += 1
        own = branches[start : start + self.size]
        padding = self.size - len(own)
        padded = [*own, *[own[0]] * padding]

        def rows(values: Tensor) -> Tensor:
            part = values[start : start + len(own)]
            return torch.cat([part, part[:1].expand(padding, *part.shape[1:])]) if padding else part

        x, extra = rows(scaled), _stack([branch.extra for branch in padded])
        output = self.unet(
            x if extra is None else torch.cat([x, extra], dim=1),
            rows(times),
            torch.stack([branch.context for branch in padded]),
            _stack([branch.added for branch in padded]),
            _stack([branch.label for branch in padded]),
            _stack([branch.guidance for branch in padded]),
        )
        return output[: len(own)].float()


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
