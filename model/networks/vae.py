"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images to latents and back.

Images are [N, 3, H, W] in [-1, 1]; latents [N, Z, H/f, W/f] in the UNet's scale, so that callers never see
a scale factor. The numbers follow CompVis' `AutoencoderKL`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig
from .layers import Attention, Downsample, Resnet, Upsample, grid, tokens
from .tiling import tiled

EPS = 1e-6


class MidAttention(Attention):
    """Single-head self-attention over all positions of [N, C, H, W], with its residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        return x + grid(super().forward(tokens(self.group_norm(x)), context), height, width)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(channels, channels, emb=None, groups=groups, eps=EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets of one resolution, then one resampling (absent at the last level)."""

    def __init__(self, c_in: int, c_out: int, resnets: int, groups: int, *, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(c_in if i == 0 else c_out, c_out, emb=None, groups=groups, eps=EPS) for i in range(resnets)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out, symmetric=False)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample is None:
            return x
        return (self.downsamplers if self.resample == "down" else self.upsamplers)[0](x)


class Encoder(nn.Module):
    """Images [N, 3, H, W] to moments [N, 2Z, H/f, W/f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.resnets, groups, resample="down" if i < last else None)
            for i, c in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [N, Z, h, w] to images [N, 3, fh, fw]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, config.resnets + 1, groups, resample="up" if i < last else None)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder, decoder, and the affine map between their latents and the UNet's."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        z = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.quant_conv else None

    def moments(self, images: Tensor, *, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each [N, Z, h, w] float32, before scaling.

        `tile` is the side in pixels above which the image is encoded in overlapping tiles.
        """

        def encode(x: Tensor) -> Tensor:
            h = self.encoder(x)
            return h if self.quant_conv is None else self.quant_conv(h)

        x = images.to(self.dtype, memory_format=torch.channels_last)
        out = tiled(encode, x, tile=tile, scale=1 / self.config.factor)
        mean, logvar = out.float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def encode(self, images: Tensor, noise: Tensor | None = None, *, tile: int | None = None) -> Tensor:
        """Latents [N, Z, h, w] float32 in the UNet's scale.

        With `noise` (unit normal, latent shape) the posterior is sampled, as CompVis and diffusers do;
        without, its mode is taken, as instruct-pix2pix and ComfyUI do.
        """
        mean, std = self.moments(images, tile=tile)
        return self.scaled(mean if noise is None else mean + std * noise.to(mean))

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Images [N, 3, H, W] float32, nominally in [-1, 1], from latents in the UNet's scale.

        `tile` is the side in pixels above which the latents are decoded in overlapping tiles.
        """

        def decode(z: Tensor) -> Tensor:
            return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

        z = self.unscaled(latents).to(self.dtype, memory_format=torch.channels_last)
        side = None if tile is None else max(tile // self.config.factor, 1)
        return tiled(decode, z, tile=side, scale=self.config.factor).float()

    def scaled(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents to the UNet's scale."""
        if self.config.latents_mean is not None:
            return (z - self._channel(self.config.latents_mean, z)) * (
                self.config.scale / self._channel(self.config.latents_std or (), z)
            )
        return (z - self.config.shift) * self.config.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        z = latents.float()
        if self.config.latents_mean is not None:
            std = self._channel(self.config.latents_std or (), z)
            return z * (std / self.config.scale) + self._channel(self.config.latents_mean, z)
        return z / self.config.scale + self.config.shift

    @staticmethod
    def _channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[None, :, None, None]

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype
