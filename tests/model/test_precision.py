"""float32 on CUDA is exact while an engine works, and the process keeps its own settings (no GPU needed)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffray.model.precision import exact_float32

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
