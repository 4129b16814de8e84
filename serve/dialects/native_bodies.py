"""What the native API takes and gives, as documentation shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffray.model import AdapterChoice, ImageRequest
from diffray.model.adapters.choices import MAX_ADAPTERS, MAX_WEIGHT
from diffray.model.request import MAX_PROMPT, MAX_SEED, MAX_SIDE, MAX_STEPS

from ..pictures import picture_text
from ..work import Finished, Work
from .parts import base64_text, seeds

Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[Annotated[int, Field(ge=0, le=65536)]], Field(min_length=2, max_length=2)]
Picture = Annotated[
    str, Field(description="Base64 of PNG, JPEG or WebP, or a data: URI. URLs are never fetched.")
]
PICTURES = ("init_image", "mask", "depth")


class Adapter(BaseModel):
    """An adapter of the model and how strongly it works."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=128, description="One that the model lists.")
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, description="0 is without.")


class JobBody(BaseModel):
    """One request: every field of an image, and how many of what kind are wanted.

    Types are strict: "512" is not a number and true is not 1. Unknown names are refused.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [{"prompt": "a large red circle on a blue background", "seed": 7, "steps": 20}]
        },
    )

    model: str | None = Field(default=None, max_length=200, description="A name of /v1/diffray/models.")
    n: int = Field(default=1, ge=1, le=1000, description="Images; their seeds count up.")
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(default=92, ge=1, le=100, description="Of jpeg and webp; webp at 100 is lossless.")
    timeout: float | None = Field(
        default=None, gt=0, description="Seconds after which nobody wants it any more."
    )

    prompt: str = Field(
        default="", max_length=MAX_PROMPT, description="May be empty; (word:1.2) weighs a word."
    )
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT)
    adapters: list[Adapter] = Field(
        default=[],
        max_length=MAX_ADAPTERS,
        description="LoRA and its kin, as /v1/diffray/models lists them for each model.",
        examples=[[{"name": "watercolour", "weight": 0.8}]],
    )
    width: Side | None = None
    height: Side | None = None
    steps: Steps | None = None
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    guidance_rescale: Share = 0.0
    guidance_start: Share = 0.0
    guidance_stop: Share = 1.0
    sampler: str | None = Field(default=None, max_length=100)
    schedule: str | None = Field(default=None, max_length=100)
    sigmas: list[float] | None = Field(
        default=None,
        max_length=MAX_STEPS,
        description="Descending noise levels instead of schedule and steps.",
    )
    eta: Share | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="None is a random one.")
    init_image: Picture | None = None
    strength: float | None = Field(
        default=None, gt=0, le=1, description="How much of init_image is made anew."
    )
    mask: Picture | None = None
    paste_back: bool = Field(default=False, description="Keep the source's own pixels outside the mask.")
    image_guidance_scale: float = Field(default=1.5, ge=1, le=100)
    depth: Picture | None = None
    noise_level: int = Field(default=20, ge=0, le=350)
    clip_skip: int = Field(default=0, ge=0, le=11)
    original_size: Pair | None = None
    crop: Pair = [0, 0]
    target_size: Pair | None = None
    aesthetic_score: float = Field(default=6.0, ge=0, le=10)
    negative_aesthetic_score: float = Field(default=2.5, ge=0, le=10)
    denoising_start: Share | None = None
    denoising_end: Share | None = None
    hires_scale: float | None = Field(
        default=None, gt=1, le=8, description="A second pass at so much larger sides."
    )
    hires_strength: float = Field(default=0.7, gt=0, le=1)
    hires_steps: Steps | None = None
    hires_upscale: Literal["latent", "latent-nearest", "lanczos"] = "latent"

    def works(self, model: str, pixels: int, preview_every: int = 0) -> list[Work]:
        """What the service is to do.

        Raises:
            InvalidRequest: a picture cannot be read, or values do not go together.
        """
        values: dict[str, Any] = {}
        for name in set(self.model_fields_set) & set(ImageRequest.__dataclass_fields__):
            value = getattr(self, name)
            values[name] = tuple(value) if isinstance(value, list) else value
        if "adapters" in values:
            values["adapters"] = tuple(AdapterChoice(a.name, a.weight) for a in self.adapters)
        for name in PICTURES:
            if values.get(name) is not None:
                values[name] = picture_text(values[name], name, pixels=pixels)
        values.pop("seed", None)
        return [
            Work(
                request=ImageRequest(**values, seed=seed),
                model=model,
                format=self.format,
                quality=self.quality,
                preview_every=preview_every,
                seconds=self.timeout,
            )
            for seed in seeds(self.seed, self.n)
        ]


class ImagesBody(JobBody):
    """A request whose answer is waited for."""

    stream: bool = Field(default=False, description="Server-sent events instead of one answer.")
    preview_every: int = Field(default=0, ge=0, le=1000, description="Steps between previews in a stream.")


class Made(BaseModel):
    """One finished picture."""

    index: int
    model: str
    model_checksum: str
    adapter_checksums: dict[str, str] = Field(description="SHA-256 of its adapters' files, by name.")
    format: str
    image: str = Field(description="Base64 of the file.")
    parameters: dict[str, Any] = Field(description="The request, every open field filled.")
    timings: dict[str, float] = Field(description="Seconds in queue, prepare, denoise, decode, encode.")

    @classmethod
    def of(cls, index: int, finished: Finished, format: str) -> Made:
        """The answer's form of a picture."""
        return cls(
            index=index,
            model=finished.model,
            model_checksum=finished.model_checksum,
            adapter_checksums=finished.adapter_checksums,
            format=format,
            image=base64_text(finished.data),
            parameters=finished.request.parameters(),
            timings={name: round(seconds, 4) for name, seconds in finished.timings.items()},
        )


class ImagesAnswer(BaseModel):
    """All pictures of a request, in the order of their seeds."""

    images: list[Made]


class ModelFacts(BaseModel):
    """What a model is, and what a request gets that does not say."""

    name: str
    family: str
    task: str
    checksum: str = Field(description="SHA-256; empty until the model was loaded.")
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    factor: int = Field(description="Width and height must be multiples of it.")
    adapters: list[str] = Field(description="What `adapters` of a request may name.")
    loaded: bool


class Catalogue(BaseModel):
    """What can be asked for."""

    models: list[ModelFacts]
    samplers: list[str]
    schedules: list[str]


class JobImage(BaseModel):
    """A finished picture of a job; fetch it at /v1/diffray/jobs/{id}/images/{index}."""

    index: int
    format: str
    model: str
    model_checksum: str
    adapter_checksums: dict[str, str] = {}
    parameters: dict[str, Any]
    timings: dict[str, float]


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    field: str | None


class JobState(BaseModel):
    """A job, now."""

    id: str
    status: Literal["running", "done", "failed", "cancelled"]
    created: float = Field(description="Unix time.")
    expires: float = Field(description="Unix time at which the job and its images are deleted.")
    total: int = Field(description="Images asked for.")
    progress: float = Field(description="Share of all steps that are done, 0..1.")
    images: list[JobImage]
    error: JobError | None = None
