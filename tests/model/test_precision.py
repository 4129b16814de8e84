"""float32 on CUDA is exact while an engine works, and the process keeps its own settings (no GPU needed)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffray.model import load_model
from diffray.model.precision import exact_float32
from tests.model import oracle

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_and_comes_back(before: bool) -> None:
    torch.backends.cudnn.allow_tf32 = before
    with exact_float32(CUDA):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cudnn.allow_tf32 is before
    with pytest.raises(KeyError):
        broken()
    assert torch.backends.cudnn.allow_tf32 is before


def broken() -> None:
    with exact_float32(CUDA):
        raise KeyError


def test_newer_settings_are_respected() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    with exact_float32(CUDA):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.rnn.fp32_precision == "ieee"


def test_other_devices_change_nothing() -> None:
    with exact_float32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_half_precision_is_close_to_full(kind: str) -> None:
    """Above 35 dB, the bound of Apple's ports to another precision; it is 45 here, and 63 with float16."""
    ask: dict[str, Any] = {
        "seed": 4,
        "steps": 4,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 3.0,
    }
    full = oracle.picture(oracle.model(kind), **ask, **oracle.inputs(kind))
    half = load_model(str(oracle.folder(kind)), device="cpu", dtype="bfloat16")
    got = oracle.picture(half, **ask, **oracle.inputs(kind))
    a, b = (np.asarray(image).astype(float) for image in (full, got))
    error = float(((a - b) ** 2).mean())
    assert 10 * math.log10(255**2 / error) > 35
    assert b.std() > 5
