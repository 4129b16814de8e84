"""Previews: quick, small, and never an error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffray.model import load_model, preview
from diffray.model.images import to_image
from diffray.model.latents import decode
from diffray.model.preview import preview_image
from tests.model import oracle


def some(height: int = 4, width: int = 6) -> Tensor:
    return torch.randn((4, height, width), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the models of these tests had autoencoders of real size."""
    monkeypatch.setattr(preview, "TINY", -1)


def test_small_autoencoder_makes_its_own_picture() -> None:
    model = oracle.model("sd1")
    wanted = to_image(decode(model, some()))
    assert wanted.size == (48, 32)
    assert np.array_equal(np.asarray(preview_image(model, some())), np.asarray(wanted))
    assert preview_image(model, some() * torch.nan).size == (48, 32)


@pytest.mark.usefixtures("large")
def test_one_pixel_per_latent() -> None:
    image = preview_image(oracle.model("sd1"), some())
    assert (image.size, image.mode) == ((6, 4), "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(preview_image(oracle.model("sd1"), some())))


@pytest.mark.usefixtures("large")
def test_linear_map_is_the_best_of_its_kind() -> None:
    """On an autoencoder that is linear itself, the preview is its picture, made small."""
    own = dataclasses.replace(oracle.model("sd1"))
    own.vae = Flat(own.vae.config)  # type: ignore[assignment]
    z = 0.2 * some()
    wanted = (own.vae.decode(z[None])[0, :, ::8, ::8] / 2 + 0.5).clamp(0, 1) * 255
    got = torch.from_numpy(np.array(preview_image(own, z))).permute(2, 0, 1)
    assert float((got - wanted).abs().max()) <= 12  # clamping bends the fit a little


class Flat(nn.Module):
    """An autoencoder whose every pixel is one linear map of its latent."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.map = torch.randn((3, 4), generator=torch.Generator().manual_seed(1)) / 8

    def decode(self, z: Tensor, *, tile: int | None = None) -> Tensor:
        return torch.einsum("oc,nchw->nohw", self.map, z).repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    latents = some()
    latents[0, 1, 1] = value
    assert preview_image(oracle.model("sd1"), latents).size == (6, 4)


@pytest.mark.usefixtures("large")
def test_autoencoder_that_overflows() -> None:
    own = load_model(str(oracle.folder("sd1")), device="cpu", dtype="float32", vae_dtype="float16")
    own.vae.decoder.conv_in.weight.data *= 60_000
    assert not own.vae.decode(some()[None]).isfinite().all()
    assert len(set(np.asarray(preview_image(own, some())).flatten().tolist())) > 1


def test_tiny_decoder_makes_full_size() -> None:
    own = dataclasses.replace(oracle.model("sd1"))

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, z: Tensor) -> Tensor:
            return self.conv(z).repeat_interleave(8, 2).repeat_interleave(8, 3).detach()

    own.preview = Tiny()  # type: ignore[assignment]
    assert preview_image(own, some()).size == (48, 32)
    assert preview_image(own, some() * torch.nan).size == (48, 32)
