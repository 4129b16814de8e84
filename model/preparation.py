"""From a resolved request to everything its denoising needs, once, before its first step.

The image's own CPU generator is the only source of randomness, and is drawn from in a fixed order, that of
diffusers' pipelines: posterior sample of the source image, low-resolution noise, initial noise, posterior
sample of the masked image, then one draw per sampler row that takes noise.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .adapters.choices import AdapterChoice
from .conditioning import Conditioning, condition, guided
from .config import ModelConfig, NoiseConfig
from .errors import InvalidRequest
from .images import gray_tensor, mask_tensor, rgb, to_image, to_tensor
from .latents import Draw, checked_latents, decode, encode
from .request import MAX_SIDE, ImageRequest
from .sampling.samplers import SamplerTable, build_table
from .sampling.schedule import NoiseSchedule

if TYPE_CHECKING:
    from .weights.load import Model


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Keeps what the mask does not repaint, for networks without mask channels.

    After a row that ends at sigma, x becomes mask * x + (1 - mask) * (source + sigma * noise).
    """

    mask: Tensor
    source: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One image, ready for its first step. Latents are [C, h, w] float32 on the model's device."""

    request: ImageRequest
    table: SamplerTable
    conditioning: Conditioning
    x: Tensor
    generator: torch.Generator
    blend: Blend | None
    adapters: tuple[AdapterChoice, ...]
    """Those of the request that change the UNet."""

    @property
    def bucket(self) -> Hashable:
        """Images with equal buckets can share a network call."""
        return (*self.x.shape, len(self.conditioning.branches[0].context), self.adapters)


def checked(model: Model, request: ImageRequest) -> tuple[ImageRequest, int, Hashable]:
    """A request resolved against the model, its steps in all passes, and the bucket of its first pass.

    Raises:
        InvalidRequest: it does not fit the model, as far as can be told without running a network.
    """
    model.adapters.check(request.adapters)
    resolved = request.resolved(model.config)
    steps = steps_of(model.config, resolved)
    chunks = len(model.text.tokenize(resolved.prompt)[0])
    negative = len(model.text.tokenize(resolved.negative_prompt or "", "negative_prompt")[0])
    most = min(tower.layers - tower.layer for tower in model.config.text) - 1
    if resolved.clip_skip > most:
        raise InvalidRequest("clip_skip", f"got {resolved.clip_skip}, this model allows 0..{most}")
    if guided(model, resolved):
        chunks = max(chunks, negative)
    adapters = model.adapters.of_unet(resolved.adapters)
    return resolved, steps, (*_latent_shape(model, resolved), chunks * model.text.positions, adapters)


def steps_of(config: ModelConfig, resolved: ImageRequest) -> int:
    """The steps of a resolved request in all passes.

    Raises:
        InvalidRequest: none is left to run, or sampler, schedule and steps do not go together.
    """
    second = refinement(resolved, config)
    steps = table_for(config, resolved).steps
    if second is not None:
        try:
            steps += table_for(config, second).steps
        except InvalidRequest as error:
            raise InvalidRequest(f"hires_{error.field}", error.reason) from error
    return steps


@torch.inference_mode()
def prepare(model: Model, request: ImageRequest, generator: torch.Generator | None = None) -> Prepared:
    """Encode text and source images, draw the initial noise, build the sampler table.

    Args:
        request: resolved against `model.config`.
        generator: the image's generator when this is a later pass of the same image; None seeds a new one.

    Raises:
        InvalidRequest: a value that only now turns out not to fit (strength leaves no step, unknown sampler).
        CheckpointError: an adapter's file turns out to be broken.
    """
    model.adapters.load(request.adapters)
    table = table_for(model.config, request)
    draw = Draw(generator or torch.Generator().manual_seed(request.seed), model.device)
    shape = _latent_shape(model, request)
    source = _source(model, request)
    mask = None if request.mask is None else mask_tensor(request.mask, *_size(request)).to(model.device)
    blended = mask is not None and model.config.task == "text"
    from_noise = _starts_from_noise(model, request)
    start = None
    if request.init_latents is not None:
        start = checked_latents(model, request.init_latents, "init_latents").to(model.device)
    elif source is not None and (blended or not from_noise):
        start = encode(model, source, draw)
    low, label = _low_resolution(model, request, draw)
    handed_over = start if request.denoising_start is not None else None
    # A hand-over draws no noise of its own, so that the sampler gets the generator's first (diffusers).
    noise = (
        torch.zeros(shape, device=model.device) if handed_over is not None and not blended else draw(shape)
    )
    if handed_over is not None:
        x = handed_over
    elif from_noise or start is None:
        x = noise * table.init_scale
    else:
        x = start + noise * float(table.sigmas[0])
    extra = low if low is not None else _extra_channels(model, request, source, mask, draw)
    blend = None
    if blended and mask is not None and start is not None:
        blend = Blend(_latent_mask(mask, shape), start, noise)
        draw(shape)  # diffusers encodes the masked image here too, for nothing but the noise it takes
    conditioning, adapters = condition(model, request, extra, label), model.adapters.of_unet(request.adapters)
    return Prepared(request, table, conditioning, x, draw.generator, blend, adapters)


def refinement(first: ImageRequest, config: ModelConfig) -> ImageRequest | None:
    """The second request of a hires fix but for its source, None without one. `first` is resolved.

    Raises:
        InvalidRequest: it is too large.
    """
    if first.hires_scale is None:
        return None
    factor = config.vae.factor
    width, height = (max(round(side * first.hires_scale / factor), 1) * factor for side in _size(first))
    if max(width, height) > MAX_SIDE:
        raise InvalidRequest("hires_scale", f"got {width}x{height}, allowed is up to {MAX_SIDE}")
    return replace(
        first,
        width=width,
        height=height,
        steps=first.hires_steps or first.steps,
        sigmas=None if first.hires_steps else first.sigmas,
        strength=first.hires_strength,
        hires_scale=None,
        init_image=None,
        init_latents=None,
        mask=None,
        denoising_start=None,
        denoising_end=None,
        original_size=(height, width),
        target_size=(height, width),
    )


def second_pass(model: Model, first: ImageRequest, latents: Tensor) -> ImageRequest:
    """The refining request of a hires fix, from the first pass' finished latents [C, h, w]."""
    second = refinement(first, model.config)
    assert second is not None
    width, height = _size(second)
    if first.hires_upscale == "lanczos":
        picture = to_image(decode(model, latents))
        return replace(second, init_image=picture.resize((width, height), Image.Resampling.LANCZOS))
    mode = "nearest-exact" if first.hires_upscale == "latent-nearest" else "bilinear"
    size = (height // model.config.vae.factor, width // model.config.vae.factor)
    return replace(second, init_latents=F.interpolate(latents[None], size=size, mode=mode)[0])


def table_for(config: ModelConfig, request: ImageRequest) -> SamplerTable:
    """The sampler table of a resolved request; equal requests share one."""
    strength = None if config.task in ("edit", "upscale") else request.strength
    return _table(
        config.noise,
        request.sampler or "",
        request.schedule,
        request.steps or 1,
        request.eta,
        request.sigmas,
        strength,
        request.denoising_start,
        request.denoising_end,
        "sdxl" if config.family.startswith("sdxl") else "sd1",
    )


@lru_cache(maxsize=1024)
def _table(
    noise: NoiseConfig,
    sampler: str,
    schedule: str | None,
    steps: int,
    eta: float | None,
    sigmas: tuple[float, ...] | None,
    strength: float | None,
    start: float | None,
    end: float | None,
    family: str,
) -> SamplerTable:
    return build_table(
        sampler,
        schedule,
        steps,
        _noise_schedule(noise),
        eta=eta,
        sigmas=sigmas,
        strength=strength,
        denoising_start=start,
        denoising_end=end,
        family=family,
    )


@lru_cache(maxsize=16)
def _noise_schedule(noise: NoiseConfig) -> NoiseSchedule:
    return NoiseSchedule(noise)


def _size(request: ImageRequest) -> tuple[int, int]:
    return request.width or 0, request.height or 0


def _latent_shape(model: Model, request: ImageRequest) -> tuple[int, int, int]:
    width, height = _size(request)
    factor = model.config.vae.factor
    return model.config.vae.latent_channels, height // factor, width // factor


def _source(model: Model, request: ImageRequest) -> Tensor | None:
    if request.init_image is None or model.config.task == "upscale":
        return None
    return to_tensor(rgb(request.init_image, *_size(request))).to(model.device)


def _starts_from_noise(model: Model, request: ImageRequest) -> bool:
    """Nothing of the source is in the initial latents: no source, or a task that sees it in extra channels.

    Inpainting starts from pure noise at strength 1 exactly; image-to-image never does (diffusers).
    """
    if request.init_latents is not None:
        return False
    if request.init_image is None or model.config.task in ("edit", "upscale"):
        return True
    return request.mask is not None and request.strength == 1.0


def _low_resolution(model: Model, request: ImageRequest, draw: Draw) -> tuple[Tensor | None, int | None]:
    """The noised low-resolution image [3, h, w] of the x4 upscaler, and its noise level as class label."""
    if model.config.task != "upscale" or request.init_image is None:
        return None, None
    factor, (width, height) = model.config.vae.factor, _size(request)
    pixels = to_tensor(rgb(request.init_image, width // factor, height // factor)).to(model.device)
    # The upscaler's low-resolution schedule (CompVis x4-upscaling.yaml): scaled-linear 0.0001 to 0.02.
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[request.noise_level].float()
    noise = draw((1, *pixels.shape))[0]
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise, request.noise_level


def _extra_channels(
    model: Model, request: ImageRequest, source: Tensor | None, mask: Tensor | None, draw: Draw
) -> Tensor | None:
    """The channels beside the latents, by task; they are never scaled with the noise level."""
    task, shape = model.config.task, _latent_shape(model, request)
    if task == "inpaint" and source is not None and mask is not None:
        return torch.cat([_latent_mask(mask, shape), encode(model, source * (mask < 0.5), draw)])
    if task == "edit" and source is not None:
        # The edit network was trained on the posterior's mode in the autoencoder's own scale.
        return model.vae.unscaled(encode(model, source, None)[None])[0]
    if task == "depth":
        assert request.depth is not None  # checked by `ImageRequest.resolved`
        depth = gray_tensor(request.depth, *_size(request)).to(model.device)
        small = F.interpolate(depth[None], size=shape[1:], mode="bicubic", align_corners=False)[0]
        low, high = small.amin(), small.amax()
        return 2 * (small - low) / (high - low).clamp(min=1e-8) - 1
    return None


def _latent_mask(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return F.interpolate(mask[None], size=shape[1:], mode="nearest")[0]
