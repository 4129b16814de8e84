"""Quick pictures of unfinished latents.

With a TAESD decoder the preview is that decoder's; an autoencoder that is no larger makes its own. Otherwise it is
a linear map from latent channels to RGB, fitted once per model to what its autoencoder makes of random smooth
latents: right for the latents of Stable Diffusion, which are nearly colours, and quick at any size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .images import to_image
from .latents import decode

if TYPE_CHECKING:
    from .weights.load import Model

TINY = 1_300_000
"""Parameters of a TAESD decoder, rounded up."""

_maps: WeakKeyDictionary[torch.nn.Module, Tensor] = WeakKeyDictionary()


@torch.inference_mode()
def preview_image(model: Model, denoised: Tensor) -> Image.Image:
    """The picture of `denoised` [C, h, w]: full size from a tiny decoder, one pixel per latent without.

    Values that are not finite are shown as gray; the image itself will fail.
    """
    if model.preview is not None:
        weight = next(model.preview.parameters())
        pixels = model.preview(denoised.nan_to_num()[None].to(weight)).float()[0]
        return to_image(2 * pixels.nan_to_num() - 1)  # TAESD makes [0, 1]
    if sum(p.numel() for p in model.vae.parameters()) <= TINY:
        return to_image(decode(model, denoised.nan_to_num()))
    factors = _linear_map(model).to(denoised.device)
    flat = denoised.float().nan_to_num().flatten(1)  # [C, hw]
    flat = torch.cat([flat, torch.ones_like(flat[:1])])
    return to_image((factors.T @ flat).reshape(-1, *denoised.shape[1:]))


def _linear_map(model: Model) -> Tensor:
    """Least-squares map [C + 1, 3] from latents and a constant to RGB in [-1, 1]."""
    if model.vae not in _maps:
        generator = torch.Generator().manual_seed(0)
        channels = model.config.vae.latent_channels
        coarse = torch.randn((4, channels, 4, 4), generator=generator)
        latents = F.interpolate(coarse, scale_factor=4, mode="bilinear").to(model.device)
        small = F.avg_pool2d(torch.stack([decode(model, z) for z in latents]), model.config.vae.factor)
        inputs = latents.permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double().cpu()
        outputs = small.clamp(-1, 1).permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        _maps[model.vae] = torch.linalg.lstsq(inputs, outputs).solution.float()
    return _maps[model.vae]
