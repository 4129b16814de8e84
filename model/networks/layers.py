"""Building blocks shared by the UNet and the autoencoder.

Modules carry the names of the diffusers folder layout, so that one key map serves both; projections that
read the same input are packed into one matrix (`to_qkv`, `to_kv`), which the loader fills from the separate
tensors of the file. Activations stay channels-last: `tokens` and `grid` are then views, not copies.

Dims: N images, C channels, H height, W width, L tokens, D context width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(values: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding [len(values), dim] in float32, cosines first (LDM's `timestep_embedding`)."""
    half = dim // 2
    rates = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    )
    angles = values.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, HW, C]."""
    return x.flatten(2).transpose(1, 2) if not _is_nhwc(x) else x.permute(0, 2, 3, 1).flatten(1, 2)


def grid(x: Tensor, height: int, width: int) -> Tensor:
    """[N, HW, C] to [N, C, H, W], channels-last in memory."""
    return x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


class Resnet(nn.Module):
    """GroupNorm-SiLU-Conv twice with a residual; the timestep embedding is added between (He et al. 2016, LDM).

    `emb` [N, E] is the embedding after its SiLU, which the caller applies once for all blocks.
    """

    def __init__(self, c_in: int, c_out: int, *, emb: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if emb is not None:
            self.time_emb_proj = nn.Linear(emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Stride-2 convolution; the UNet pads all sides, the autoencoder right and bottom only."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest upsampling to `size` (H, W), or by 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        scale = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=scale, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention over [N, L, C]; to itself, or to a context [N, M, D] when `context` is given."""

    def __init__(self, dim: int, heads: int, *, context: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        if context is None:
            self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        else:
            self.to_q = nn.Linear(dim, dim, bias=bias)
            self.to_kv = nn.Linear(context, 2 * dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q = self.to_q(x)
            k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)
        )  # [N, heads, L, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))
