"""Pictures to latents and back, one at a time: a result depends on nothing but its own input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .errors import InvalidRequest
from .images import rgb, to_image, to_tensor
from .networks.vae import Autoencoder
from .request import MAX_SIDE, upright_size

if TYPE_CHECKING:
    from .weights.load import Model

WHOLE = 1536 * 1536
"""Pixels up to which the autoencoder sees a picture whole, so every size that SDXL was trained on."""
TILE = 1024
"""Side in pixels of the tiles in which it works on a larger one."""


class Draw:
    """Unit normal noise from one image's generator: drawn on the CPU in float32, the same on every device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.device = device

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


def encode(model: Model, pixels: Tensor, draw: Draw | None) -> Tensor:
    """Latents [C, h, w] of pixels [3, H, W]; the posterior is sampled, or its mode taken without `draw`.

    Half precision that overflows is done again in float32.
    """
    factor, channels = model.config.vae.factor, model.config.vae.latent_channels
    height, width = pixels.shape[-2] // factor, pixels.shape[-1] // factor
    noise = None if draw is None else draw((1, channels, height, width))
    tile = _tile(width * factor, height * factor)
    return _exact(model.vae, lambda vae: vae.encode(pixels[None], noise, tile=tile))[0]


def decode(model: Model, latents: Tensor) -> Tensor:
    """Pixels [3, H, W] of finished latents [C, h, w]; half precision that overflows is done again in float32."""
    tile = _tile(*(side * model.config.vae.factor for side in latents.shape[-2:]))
    return _exact(model.vae, lambda vae: vae.decode(latents[None], tile=tile))[0]


@torch.inference_mode()
def latents_of(model: Model, image: Image.Image, width: int, height: int, seed: int | None) -> Tensor:
    """Latents [C, h, w] float32 on the CPU of a picture resized to `width` x `height`; see `Engine.encode`."""
    draw = None if seed is None else Draw(torch.Generator().manual_seed(seed), model.device)
    pixels = to_tensor(rgb(image, width, height)).to(model.device)
    return ordinary(encode(model, pixels, draw))


@torch.inference_mode()
def picture_of(model: Model, latents: Tensor) -> Image.Image:
    """The picture of latents [C, h, w] in the UNet's scale."""
    return to_image(decode(model, latents.to(model.device)))


def ordinary(tensor: Tensor) -> Tensor:
    """A copy on the CPU that is no inference tensor, for callers to do with as they like."""
    with torch.inference_mode(False):
        return tensor.cpu().clone()


def checked_size(model: Model, image: Image.Image, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height at which to encode: as asked, else the picture's own, floored to whole latents.

    Raises:
        InvalidRequest: `width` or `height` is not a multiple of the autoencoder's factor within bounds.
    """
    factor = model.config.vae.factor
    own = upright_size(image)
    size = []
    for name, asked, side in (("width", width, own[0]), ("height", height, own[1])):
        value = max(side // factor, 1) * factor if asked is None else asked
        if type(value) is not int or value % factor or not factor <= value <= MAX_SIDE:
            allowed = f"a multiple of {factor} in {factor}..{MAX_SIDE}"
            raise InvalidRequest(name, f"got {value!r}, allowed is {allowed}")
        size.append(value)
    return size[0], size[1]


def checked_latents(model: Model, latents: Any, field: str = "latents") -> Tensor:
    """`latents` as a float32 tensor [C, h, w] of this model.

    Raises:
        InvalidRequest: for `field`: another shape, too large, or values that are not finite.
    """
    channels, most = model.config.vae.latent_channels, MAX_SIDE // model.config.vae.factor
    shape = tuple(getattr(latents, "shape", ()))
    if len(shape) != 3 or shape[0] != channels or not all(1 <= side <= most for side in shape[1:]):
        allowed = f"[{channels}, height, width] of sides up to {most}"
        raise InvalidRequest(field, f"got shape {list(shape)}, allowed is {allowed}")
    tensor = torch.as_tensor(latents, dtype=torch.float32)
    if not bool(tensor.isfinite().all()):
        raise InvalidRequest(field, "got values that are not finite")
    return tensor


def _tile(width: int, height: int) -> int | None:
    return TILE if width * height > WHOLE else None


def _exact(vae: Autoencoder, run: Callable[[Autoencoder], Tensor]) -> Tensor:
    """`run` with the autoencoder; if the result is not finite, with a float32 copy of it.

    The model stays as it is, so that one image that overflows changes no bit of the images after it.
    """
    result = run(vae)
    if vae.dtype == torch.float32 or bool(result.isfinite().all()):
        return result
    return run(copy.deepcopy(vae).to(torch.float32))
