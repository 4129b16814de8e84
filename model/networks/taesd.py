"""TAESD, the tiny autoencoder by Ollin Boer Bohan: previews in milliseconds, latents in the UNet's scale.

Reference: madebyollin/taesd (MIT); networks and numbering follow its plain `nn.Sequential`, which single
files store as is; the diffusers folder (`AutoencoderTiny`) numbers the decoder one lower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.safefile import WeightFile

WIDTH = 64
"""Channels of every hidden layer."""


class Clamp(nn.Module):
    """Soft clamp of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Sequential):
    """Images [N, 3, H, W] in [0, 1] to latents [N, Z, H/8, W/8] in the UNet's scale."""

    def __init__(self, latent_channels: int = 4) -> None:
        layers: list[nn.Module] = [_conv(3), Block()]
        for _ in range(3):
            layers += [_conv(stride=2, bias=False), Block(), Block(), Block()]
        super().__init__(*layers, nn.Conv2d(WIDTH, latent_channels, 3, padding=1))


class TinyDecoder(nn.Sequential):
    """Latents [N, Z, h, w] in the UNet's scale to images [N, 3, 8h, 8w], nominally in [0, 1]."""

    def __init__(self, latent_channels: int = 4) -> None:
        layers: list[nn.Module] = [Clamp(), _conv(latent_channels), nn.ReLU()]
        for _ in range(3):
            layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), _conv(bias=False)]
        super().__init__(*layers, Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))


def _conv(c_in: int = WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, WIDTH, 3, stride=stride, padding=1, bias=bias)


def load_decoder(path: Path, latent_channels: int = 4) -> TinyDecoder:
    """A TAESD decoder from its own file, from one with both halves, or from a diffusers folder.

    Raises:
        CheckpointError: not a TAESD decoder for latents of that many channels.
    """
    decoder = TinyDecoder(latent_channels)
    _load(decoder, path, "decoder")
    return decoder


def load_encoder(path: Path, latent_channels: int = 4) -> TinyEncoder:
    """A TAESD encoder; see `load_decoder`."""
    encoder = TinyEncoder(latent_channels)
    _load(encoder, path, "encoder")
    return encoder


def _load(network: nn.Sequential, path: Path, half: str) -> None:
    file = WeightFile(path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path)
    wanted = network.state_dict()
    names = next((n for n in _namings(wanted, half) if n[next(iter(n))] in file.entries), None)
    if names is None:
        raise CheckpointError(f"{file.path}: no TAESD {half} in it")
    wrong = [key for name, key in names.items() if _shape(file, key) != tuple(wanted[name].shape)]
    if wrong:
        raise CheckpointError(
            f"{file.path}: not this TAESD {half}: missing or misshapen are {', '.join(wrong[:10])}"
        )
    network.load_state_dict({name: file.read(key).clone() for name, key in names.items()})
    file.close()


def _shape(file: WeightFile, key: str) -> tuple[int, ...] | None:
    return file.entries[key].shape if key in file.entries else None


def _namings(wanted: Mapping[str, object], half: str) -> Iterator[dict[str, str]]:
    """The names that a file may give to this network's parameters, per naming."""
    lower = int(half == "decoder")  # diffusers has no module for the clamp
    for prefix, shift in ((f"{half}.layers.", lower), (f"taesd_{half}.", 0), (f"{half}.", 0), ("", 0)):
        split = {name: name.split(".", 1) for name in wanted}
        yield {name: f"{prefix}{int(number) - shift}.{rest}" for name, (number, rest) in split.items()}
