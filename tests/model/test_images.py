"""Pictures to tensors and back, whatever their mode, size and orientation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from diffray.model import GenerationError
from diffray.model.images import gray_tensor, mask_tensor, rgb, to_image, to_tensor
from tests.model import oracle
from tests.model.oracle import source_image

DIFFUSERS = VaeImageProcessor(vae_scale_factor=8)
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (16, 64)])
def test_pixels_equal_diffusers(size: tuple[int, int]) -> None:
    image = source_image(48, 40)
    wanted = DIFFUSERS.preprocess(image, width=size[0], height=size[1])[0]
    assert torch.allclose(to_tensor(rgb(image, *size)), wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_masks_equal_diffusers(size: tuple[int, int]) -> None:
    mask = source_image(48, 40).convert("L")
    wanted = MASKS.preprocess(mask, width=size[0], height=size[1])[0]
    assert torch.equal(mask_tensor(mask, *size), wanted)


def test_pictures_equal_diffusers() -> None:
    pixels = 1.2 * torch.randn((3, 8, 12), generator=torch.Generator().manual_seed(0))
    wanted = DIFFUSERS.postprocess(pixels[None], output_type="pil")[0]
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(wanted))


def test_there_and_back_is_exact() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=-1))
    assert np.array_equal(np.asarray(to_image(to_tensor(image))), np.asarray(image))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_that_are_not_finite(value: float) -> None:
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(GenerationError, match="finite"):
        to_image(pixels)


GRAY = np.linspace(0, 255, 32 * 24).round().astype(np.uint8).reshape(24, 32)
PLAIN = Image.fromarray(GRAY)


@pytest.mark.parametrize(
    "image",
    [
        PLAIN.convert("RGB"),
        PLAIN.convert("RGBA"),
        PLAIN.convert("LA"),
        PLAIN.convert("RGB").quantize(256, dither=Image.Dither.NONE),
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY.astype(np.int32) * 257),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_is_the_same_picture(image: Image.Image) -> None:
    got = np.asarray(rgb(image, *image.size)).astype(int)
    assert np.abs(got - GRAY[..., None]).max() <= (1 if image.mode == "P" else 0)
    assert torch.equal(
        mask_tensor(image.convert("RGB") if image.mode == "P" else image, *image.size),
        mask_tensor(PLAIN, *image.size),
    )


def test_alpha_is_dropped() -> None:
    clear = source_image().convert("RGBA")
    clear.putalpha(0)
    assert np.array_equal(np.asarray(rgb(clear, 32, 32)), np.asarray(source_image()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    """A turned picture gives the image that the upright one gives, and at its size."""
    stored = source_image(40, 24)
    stored.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(stored)
    ask: dict[str, Any] = {"steps": 2, "strength": 0.5, "sampler": "euler"}
    own = oracle.model("sd1")
    turned, plain = (oracle.picture(own, init_image=image, **ask) for image in (stored, upright))
    assert turned.size == upright.size
    assert np.array_equal(np.asarray(turned), np.asarray(plain))


def test_source_is_resized_to_what_was_asked() -> None:
    large = source_image(80, 56)
    small = large.resize((32, 24), Image.Resampling.LANCZOS)
    ask: dict[str, Any] = {"steps": 2, "strength": 0.5, "sampler": "euler"}
    own = oracle.model("sd1")
    resized = oracle.latents(own, init_image=large, width=32, height=24, **ask)
    assert torch.equal(resized, oracle.latents(own, init_image=small, **ask))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_depth_keeps_its_unit(dtype: Any) -> None:
    top = 200 if dtype is np.uint8 else 40_000
    values = np.linspace(0, top, 32 * 24).reshape(24, 32).astype(dtype)
    tensor = gray_tensor(Image.fromarray(values), 32, 24)
    assert np.array_equal(tensor.numpy()[0], values.astype(np.float32))
    assert gray_tensor(Image.fromarray(values), 16, 8).shape == (1, 8, 16)
