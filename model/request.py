"""One request, one image: everything that determines it, as a frozen value that validates itself.

Batch rows and HTTP bodies both become an `ImageRequest`; nothing else reaches the engine. What a request
leaves open (None) is filled from the model's defaults by `resolved`, so that two equal resolved requests
are the same image.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from .adapters.choices import AdapterChoice, active, adapter_choices
from .errors import InvalidRequest
from .sampling.samplers import SAMPLERS, resolve

if TYPE_CHECKING:
    from .config import Defaults, ModelConfig

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_SIDE = 8192
MAX_PROMPT = 20_000
UPSCALES = ("latent", "latent-nearest", "lanczos")
ORIENTATION = 0x0112
"""The EXIF tag; from 5 to 8 it swaps the sides."""


NEEDED_PICTURES = {
    "inpaint": ("init_image", "mask"),
    "edit": ("init_image",),
    "upscale": ("init_image",),
    "depth": ("init_image", "depth"),
}
"""Task of a model to the fields without which it makes no image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Everything that determines one image.

    Attributes:
        prompt: text with weights `(word:1.2)`, `[word]` and `BREAK`; may be empty (unconditional).
        negative_prompt: None is "absent" (zeros on SDXL), "" is really encoded, as in diffusers.
        width, height: pixels, a multiple of the VAE factor; None takes the model's, or the init image's.
        steps: 1..1000 sampler steps before `strength` is applied.
        guidance_scale: 0..100; classifier-free guidance is off at 1 and below.
        guidance_rescale: 0..1, Lin et al. 2023, section 3.4.
        guidance_start, guidance_stop: the share of the steps between which guidance is on, 0..1.
        sampler, schedule: names that diffusers, ComfyUI or AUTOMATIC1111 know, "DPM++ 2M Karras" too. None takes
            the model's; without a schedule another sampler takes the one that its diffusers class would.
        sigmas: an explicit descending sigma list that replaces `schedule` and `steps`; a final 0 is implied.
        eta: stochasticity of DDIM (default 0) and ancestral samplers (default 1), 0..1.
        seed: 0..2**63-1; all noise of this image comes from it.
        init_image, strength: image-to-image; strength in (0, 1]. None takes what diffusers' pipeline does: 0.8,
            on SDXL 0.3; with a mask 1, on SDXL 0.9999.
        mask: where it is at least half white is repainted, the rest is kept: by the network if it was trained
            to, else by blending. Gray is not a share, as in diffusers; blurring a mask, growing it and
            working on its surroundings alone are the caller's.
        paste_back: copy the unmasked source pixels over the result.
        image_guidance_scale: guidance on the source image of instruct-pix2pix, 1..100.
        depth: depth map for SD2-depth; noise_level: 0..350 for the x4 upscaler.
        clip_skip: 0..11 text layers skipped from the family's own choice, in both prompts.
        original_size, crop, target_size: SDXL micro-conditioning as (height, width) or (top, left).
        aesthetic_score, negative_aesthetic_score: SDXL refiner conditioning.
        denoising_start, denoising_end: share of the schedule at which this model takes over or hands over
            (base-to-refiner hand-over), by timestep value as in diffusers.
        init_latents: latents of an earlier stage in UNet scale, [C, h, w] float32 (refiner hand-over); the
            one field that equality does not see.
        output: "image" or "latents".
        hires_scale: hires fix: a second pass at this many times the size, above 1 and up to 8; None is without.
        hires_strength: how much the second pass redoes, in (0, 1].
        hires_steps: steps of the second pass before its strength is applied; None takes `steps`.
        hires_upscale: "latent" (bilinear on latents), "latent-nearest", or "lanczos" (decode, resize, encode).
            It, `hires_strength` and `hires_steps` have no effect without `hires_scale`.
        adapters: LoRAs and their relatives that the model was loaded with, by name, each with a weight;
            whatever `adapter_choices` reads. Their order does not matter.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    sampler: str | None = None
    schedule: str | None = None
    sigmas: tuple[float, ...] | None = None
    eta: float | None = None
    seed: int = 0
    init_image: Image.Image | None = field(default=None, hash=False)
    strength: float | None = None
    mask: Image.Image | None = field(default=None, hash=False)
    paste_back: bool = False
    image_guidance_scale: float = 1.5
    depth: Image.Image | None = field(default=None, hash=False)
    noise_level: int = 20
    clip_skip: int = 0
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    denoising_start: float | None = None
    denoising_end: float | None = None
    init_latents: Any = field(default=None, compare=False)
    output: str = "image"
    hires_scale: float | None = None
    hires_strength: float = 0.7
    hires_steps: int | None = None
    hires_upscale: str = "latent"
    adapters: tuple[AdapterChoice, ...] = ()

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        if self.negative_prompt is not None:
            _text("negative_prompt", self.negative_prompt)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 8, MAX_SIDE)
        if self.steps is not None:
            _integer("steps", self.steps, 1, MAX_STEPS)
        if self.guidance_scale is not None:
            _between("guidance_scale", self.guidance_scale, 0.0, 100.0)
        for name in ("guidance_rescale", "guidance_start", "guidance_stop"):
            _between(name, getattr(self, name), 0.0, 1.0)
        if self.guidance_start > self.guidance_stop:
            raise InvalidRequest(
                "guidance_start", f"{self.guidance_start} is above guidance_stop {self.guidance_stop}"
            )
        for name in ("sampler", "schedule"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise InvalidRequest(name, f"got {getattr(self, name)!r}, allowed is a name")
        if self.eta is not None:
            _between("eta", self.eta, 0.0, 1.0)
        _integer("seed", self.seed, 0, MAX_SEED)
        if self.strength is not None:
            _between("strength", self.strength, 0.0, 1.0, open_low=True)
        _between("image_guidance_scale", self.image_guidance_scale, 1.0, 100.0)
        _integer("noise_level", self.noise_level, 0, 350)
        _integer("clip_skip", self.clip_skip, 0, 11)
        for name in ("original_size", "target_size"):
            if getattr(self, name) is not None:
                _pair(name, getattr(self, name))
        _pair("crop", self.crop)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            _between(name, getattr(self, name), 0.0, 10.0)
        for name in ("denoising_start", "denoising_end"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 0.0, 1.0)
        _one_of("output", self.output, ("image", "latents"))
        if self.sigmas is not None:
            _sigmas(self.sigmas)
        for name in ("init_image", "mask", "depth"):
            if not isinstance(getattr(self, name), Image.Image | None):
                raise InvalidRequest(
                    name, f"got {type(getattr(self, name)).__name__}, allowed is a PIL image"
                )
        if not isinstance(self.paste_back, bool):
            raise InvalidRequest("paste_back", f"got {self.paste_back!r}, allowed is true or false")
        if self.hires_scale is not None:
            _between("hires_scale", self.hires_scale, 1.0, 8.0, open_low=True)
        _between("hires_strength", self.hires_strength, 0.0, 1.0, open_low=True)
        if self.hires_steps is not None:
            _integer("hires_steps", self.hires_steps, 1, MAX_STEPS)
        _one_of("hires_upscale", self.hires_upscale, UPSCALES)
        object.__setattr__(self, "adapters", adapter_choices(self.adapters))
        if self.mask is not None and self.init_image is None:
            raise InvalidRequest("mask", "a mask needs an init_image")
        if self.hires_scale is not None and self.output == "latents":
            raise InvalidRequest("hires_scale", "not allowed with output='latents'")

    def resolved(self, config: ModelConfig) -> ImageRequest:
        """This request with every open field filled from `config` and checked against it.

        Raises:
            InvalidRequest: a value does not fit this model (side not a multiple of the VAE factor, a missing
                or superfluous source image, ...).
        """
        defaults = config.defaults
        self._check_task(config)
        width, height = self._size(config)
        for name, value in (("width", width), ("height", height)):
            if value % config.vae.factor or not config.vae.factor <= value <= MAX_SIDE:
                allowed = f"a multiple of {config.vae.factor} up to {MAX_SIDE}"
                raise InvalidRequest(name, f"got {value}, allowed is {allowed}")
        guidance = defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        sampler, schedule = self._solver(defaults)
        strength = self.strength
        if self.init_image is not None and strength is None:
            strength = self._default_strength(config)
        return replace(
            self,
            width=width,
            height=height,
            steps=len(self.sigmas) if self.sigmas is not None else (self.steps or defaults.steps),
            guidance_scale=float(guidance),
            sampler=sampler,
            schedule=schedule,
            strength=strength,
            original_size=self.original_size or (height, width),
            target_size=self.target_size or (height, width),
            adapters=active(self.adapters),
        )

    def _solver(self, defaults: Defaults) -> tuple[str, str]:
        """Canonical sampler and schedule; one that is open is the model's, or that of the sampler's class."""
        sampler, schedule = resolve(self.sampler or defaults.sampler, self.schedule)
        if schedule is None and (defaults.schedule_for_all or sampler == resolve(defaults.sampler, None)[0]):
            schedule = resolve(sampler, defaults.schedule)[1]
        return sampler, schedule or SAMPLERS[sampler].convention.spacing

    def _default_strength(self, config: ModelConfig) -> float:
        """That of diffusers' pipeline for the task; just below 1 keeps a trace of the source (SDXL)."""
        xl = config.family.startswith("sdxl")
        if config.task in ("edit", "upscale"):
            return 1.0
        if self.mask is not None:
            return 0.9999 if xl else 1.0
        return 0.3 if xl else 0.8

    def _size(self, config: ModelConfig) -> tuple[int, int]:
        """Width and height: of the latents, else as asked, else of the source, else the model's default."""
        factor = config.vae.factor
        if self.init_latents is not None:
            shape = tuple(getattr(self.init_latents, "shape", ()))
            if len(shape) != 3 or shape[0] != config.vae.latent_channels:
                allowed = f"[{config.vae.latent_channels}, height, width]"
                raise InvalidRequest("init_latents", f"got shape {list(shape)}, allowed is {allowed}")
            return int(shape[2]) * factor, int(shape[1]) * factor
        source = self.init_image or self.depth
        across, down = (None, None) if source is None else upright_size(source)
        if config.task == "upscale" and across and down:
            return across * factor, down * factor
        width = self.width or (across and max(across // factor, 1) * factor) or config.defaults.width
        height = self.height or (down and max(down // factor, 1) * factor) or config.defaults.height
        return width, height

    def _check_task(self, config: ModelConfig) -> None:
        for wanted in NEEDED_PICTURES.get(config.task, ()):
            if getattr(self, wanted) is None:
                raise InvalidRequest(wanted, f"got nothing, {config.task} models need one")
        if self.mask is not None and config.task not in ("text", "inpaint"):
            raise InvalidRequest("mask", f"{config.task} models take none")
        if self.hires_scale is not None and config.task != "text":
            raise InvalidRequest("hires_scale", f"{config.task} models have no second pass")
        if self.strength is not None and self.init_image is None and self.init_latents is None:
            raise InvalidRequest("strength", f"got {self.strength} without an init_image")
        if self.depth is not None and config.task != "depth":
            raise InvalidRequest(
                "depth", f"only a depth model takes one, this is {config.family} {config.task}"
            )

    @property
    def cost(self) -> float:
        """Megapixel-steps of a resolved request, both passes of a hires fix together.

        A measure to compare requests by: width x height x steps that are really taken, over a million.
        """
        pixels = (self.width or 0) * (self.height or 0) / 1e6
        steps = self.steps or 0
        cost = pixels * steps * (1.0 if self.strength is None else self.strength)
        if self.hires_scale is not None:
            cost += pixels * self.hires_scale**2 * (self.hires_steps or steps) * self.hires_strength
        return cost

    def parameters(self) -> dict[str, Any]:
        """The fields that are plain values, in declaration order: what goes into a dataset's columns."""
        images = ("init_image", "mask", "depth", "init_latents")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in images}
        return values | {"adapters": [choice._asdict() for choice in self.adapters]}


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image after the rotation that its EXIF orientation asks for.

    Raises:
        InvalidRequest: the file behind it is broken.
    """
    width, height = image.size
    try:
        sideways = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise InvalidRequest("init_image", f"cannot be read: {error}") from error
    return (height, width) if sideways else (width, height)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(name, f"got {type(value).__name__}, allowed is text")
    if len(value) > MAX_PROMPT:
        raise InvalidRequest(name, f"got {len(value)} characters, allowed are at most {MAX_PROMPT}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"got {value!r}, allowed is an integer in {low}..{high}")
    if not low <= value <= high:
        raise InvalidRequest(name, f"got {value}, allowed is {low}..{high}")


def _between(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    allowed = f"{'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(name, f"got {value!r}, allowed is a number in {allowed}")
    if not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(name, f"got {value}, allowed is {allowed}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(name, f"got {value!r}, allowed is one of {', '.join(allowed)}")


def _pair(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InvalidRequest(name, f"got {value!r}, allowed is a pair of integers")
    for number in value:
        _integer(name, number, 0, 65536)


def _sigmas(values: object) -> None:
    if not isinstance(values, tuple):
        raise InvalidRequest("sigmas", f"got {type(values).__name__}, allowed is a tuple of numbers")
    if not 1 <= len(values) <= MAX_STEPS:
        raise InvalidRequest("sigmas", f"got {len(values)} values, allowed are 1..{MAX_STEPS}")
    for value in values:
        _between("sigmas", value, 0.0, 1e5, open_low=True)
    if any(a <= b for a, b in itertools.pairwise(values)):
        raise InvalidRequest("sigmas", "allowed is a strictly descending list")
