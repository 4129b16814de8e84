"""The denoising network of the UNet family: SD 1, SD 2, SDXL base and refiner, inpainting, instruct-pix2pix,
depth, x4 upscaler and the pruned XL shapes. One class; `UNetConfig` carries every difference.

Reference behaviour: CompVis' and Stability's `UNetModel`, diffusers' `UNet2DConditionModel`.
Dims: N rows, C channels, H and W latent pixels, L text tokens, D text width, E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Depths, UNetConfig
from .layers import Attention, Downsample, Resnet, Upsample, grid, sinusoid, tokens

RESNET_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


class GEGLU(nn.Module):
    """x * gelu(gate) with both halves from one projection, value first (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU with inner width 4C, then a projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": GEGLU(dim, 4 * dim), "2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a LayerNorm, with residuals."""

    def __init__(self, dim: int, heads: int, context: int, *, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context=context if cross_only else None)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context=context)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.cross_only else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, dim: int, heads: int, depth: int, config: UNetConfig, *, cross_only: bool) -> None:
        super().__init__()
        self.linear = config.linear_projection
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, heads, config.context_dim, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.linear else tokens(self.proj_in(h))  # [N, HW, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        h = grid(self.proj_out(h), height, width) if self.linear else self.proj_out(grid(h, height, width))
        return x + h


class Block(nn.Module):
    """One level of the way down or up: resnets, each followed by its transformer if it has one."""

    def __init__(
        self, inputs: list[int], level: int, depths: Depths, config: UNetConfig, *, resample: str | None
    ) -> None:
        super().__init__()
        channels, emb = config.channels[level], 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            Resnet(c, channels, emb=emb, groups=config.norm_groups, eps=RESNET_EPS) for c in inputs
        )
        self.attentions = _transformers(channels, level, depths, config)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(channels, symmetric=True)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(channels)])

    def layer(self, index: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, emb)
        name = str(index)
        return self.attentions[name](x, context) if name in self.attentions else x


class DownBlock(Block):
    """Keeps every intermediate result for the way up."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, emb, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpBlock(Block):
    """Takes the kept results back, last first, as further channels."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), emb, context)
        if hasattr(self, "upsamplers"):
            # The next level's maps are not twice as large when a side was odd on the way down.
            x = self.upsamplers[0](x, tuple(skips[-1].shape[-2:]))
        return x


class MidBlock(nn.Module):
    """The lowest resolution: resnet, transformer, resnet; pruned models lack parts of it."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        level, channels, emb = len(config.channels) - 1, config.channels[-1], 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            Resnet(channels, channels, emb=emb, groups=config.norm_groups, eps=RESNET_EPS)
            for _ in range(config.mid_resnets)
        )
        self.attentions = _transformers(channels, level, (config.mid_depth or 0,), config)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if index == 0 and "0" in self.attentions:
                x = self.attentions["0"](x, context)
        return x


class Embedding(nn.Module):
    """Two linear layers with a SiLU between; `cond_proj` adds the guidance embedding of distilled networks."""

    def __init__(self, c_in: int, c_out: int, *, guidance: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)
        self.cond_proj = None if guidance is None else nn.Linear(guidance, c_in, bias=False)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Predicts epsilon, v or x0 (the checkpoint's `prediction_type`) from noisy latents."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.channels, len(config.channels)
        emb = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], emb, guidance=config.guidance_dim)
        if config.added_dim is not None and config.added_kind == "text_time":
            self.add_embedding = Embedding(config.added_dim, emb)
        elif config.added_dim is not None:
            self.class_embedding: nn.Module = Embedding(config.added_dim, emb)
        elif config.class_count is not None:
            self.class_embedding = nn.Embedding(config.class_count, emb)
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        c = channels[0]
        for level, depths in enumerate(config.down):
            inputs = [c, *[channels[level]] * (len(depths) - 1)]
            last = level == levels - 1
            self.down_blocks.append(
                DownBlock(inputs, level, depths, config, resample=None if last else "down")
            )
            c = channels[level]
            skips += [c] * (len(depths) + (not last))
        self.mid_block = MidBlock(config) if config.mid_resnets else None
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            depths = config.up[level]
            inputs = [(c if i == 0 else channels[level]) + skips.pop() for i in range(len(depths))]
            self.up_blocks.append(UpBlock(inputs, level, depths, config, resample="up" if level else None))
            c = channels[level]
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, c, eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        added: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """One evaluation; every row has its own timestep.

        Args:
            x: [N, in_channels, H, W], scaled for the network, with any extra channels appended.
            timesteps: [N] float, 0..train_steps-1, fractions allowed.
            context: [N, L, D] text states.
            added: [N, added_dim] pooled text and size sinusoids (SDXL), or image embedding (unCLIP).
            class_labels: [N] int64 noise level (x4 upscaler).
            guidance: [N, guidance_dim] embedding of the guidance scale (distilled networks).

        Returns:
            [N, out_channels, H, W] in the network's dtype.
        """
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(
            sinusoid(timesteps, self.config.channels[0]).to(dtype),
            None if guidance is None else guidance.to(dtype),
        )
        if added is not None:
            embed = self.add_embedding if self.config.added_kind == "text_time" else self.class_embedding
            emb = emb + embed(added.to(dtype))
        if class_labels is not None:
            emb = emb + self.class_embedding(class_labels)
        emb = F.silu(emb)  # [N, E]; every resnet wants it after the SiLU
        context = context.to(dtype)
        x = self.conv_in(x.to(dtype, memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _transformers(channels: int, level: int, depths: Depths, config: UNetConfig) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            str(index): SpatialTransformer(
                channels, config.heads[level], depth, config, cross_only=config.cross_attention_only[level]
            )
            for index, depth in enumerate(depths)
            if depth
        }
    )
