"""What float32 means on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Real float32 convolutions on CUDA, for as long as this lasts; elsewhere nothing changes.

    torch lets cuDNN compute them in TF32 unless told otherwise, with 10 bits of mantissa instead of 23, a
    thousand times coarser than what the networks are held to. The setting is one of the whole process: it is put
    back afterwards. Matrix products are exact by torch's default; who turns that off for the process has
    asked for it, and keeps it. Half precision is not touched by either.
    """
    if device.type != "cuda":
        yield
        return
    owner: Any = torch.backends.cudnn
    name: str = "allow_tf32"
    exact: bool | str = False
    try:
        before = owner.allow_tf32
    except RuntimeError:  # the process uses torch's newer settings per operator, which hide the older one
        owner, name, exact = owner.conv, "fp32_precision", "ieee"
        before = owner.fp32_precision
    setattr(owner, name, exact)
    try:
        yield
    finally:
        setattr(owner, name, before)
