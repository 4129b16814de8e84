"""Bodies and answers of Stability's REST API: v1 by engine, and v2beta stable-image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Style = Annotated[
    str | None, Field(description="Not supported: must be left out; describe it in the prompt.")
]
V1_SEED = Annotated[int, Field(0, ge=0, le=4294967295, description="0 is a random one.")]
V2_SEED = Annotated[int, Field(0, ge=0, le=4294967294, description="0 is a random one.")]
Samples = Annotated[int, Field(1, ge=1, le=10, description="Above 1 only with Accept: application/json.")]
SAMPLERS = Literal[
    "DDIM",
    "DDPM",
    "K_DPMPP_2M",
    "K_DPMPP_2S_ANCESTRAL",
    "K_DPM_2",
    "K_DPM_2_ANCESTRAL",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "K_HEUN",
    "K_LMS",
]
Format = Annotated[Literal["png", "jpeg", "webp"], Field("png")]


class Strict(BaseModel):
    """Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPrompt(Strict):
    """One of several prompts."""

    text: str = Field(min_length=1, max_length=2000)
    weight: float | None = Field(None, ge=-10, le=10, description="Below 0 it says what should not be there.")


class V1(Strict):
    """What all generations of v1 have. What is left out is the model's own default."""

    text_prompts: list[TextPrompt] = Field(min_length=1, max_length=16)
    cfg_scale: float | None = Field(None, ge=0, le=35)
    clip_guidance_preset: (
        Literal["NONE", "FAST_BLUE", "FAST_GREEN", "SIMPLE", "SLOW", "SLOWER", "SLOWEST"] | None
    ) = Field(None, description="Accepted for older clients, without effect, as with SDXL at Stability.")
    sampler: SAMPLERS | None = None
    samples: Samples
    seed: V1_SEED
    steps: int | None = Field(None, ge=1, le=150)
    style_preset: Style = None
    width: int | None = None
    height: int | None = None


class TextToImage(V1):
    """POST /v1/generation/{engine}/text-to-image."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text_prompts": [{"text": "a large red circle on a blue background"}]},
                {
                    "text_prompts": [{"text": "a lighthouse on a cliff"}, {"text": "blurry", "weight": -1}],
                    "cfg_scale": 7,
                    "height": 512,
                    "width": 512,
                    "samples": 2,
                    "steps": 30,
                    "sampler": "K_DPMPP_2M",
                },
            ]
        }
    )

    extras: dict[str, Any] | None = Field(None, description="Must be empty.")


class ImageToImage(V1):
    """POST /v1/generation/{engine}/image-to-image, beside its file."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "text_prompts[0][text]": "a green triangle",
                    "init_image_mode": "IMAGE_STRENGTH",
                    "image_strength": "0.35",
                }
            ]
        }
    )

    init_image_mode: Literal["IMAGE_STRENGTH", "STEP_SCHEDULE"] = "IMAGE_STRENGTH"
    image_strength: float = Field(0.35, ge=0, lt=1, description="How much of the image stays.")
    step_schedule_start: float = Field(
        0.65,
        gt=0,
        le=1,
        description="With STEP_SCHEDULE: how much is made anew, from the start of the steps.",
    )
    step_schedule_end: float | None = Field(None, description="Only 0.")


class Masking(V1):
    """POST /v1/generation/{engine}/image-to-image/masking, beside its files."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text_prompts[0][text]": "a green triangle", "mask_source": "MASK_IMAGE_WHITE"}]
        }
    )

    mask_source: Literal["MASK_IMAGE_WHITE", "MASK_IMAGE_BLACK", "INIT_IMAGE_ALPHA"] = Field(
        description="What is repainted: the white or the black of the mask, or what is transparent."
    )


class Artifact(BaseModel):
    """One image."""

    base64: str
    seed: int
    finishReason: Literal["SUCCESS"] = "SUCCESS"  # noqa: N815 (its name in JSON)


class Artifacts(BaseModel):
    """The JSON answer of v1."""

    artifacts: list[Artifact]


class Engine(BaseModel):
    """One model."""

    id: str
    name: str
    description: str
    type: Literal["PICTURE"] = "PICTURE"


class Organization(BaseModel):
    """Of an account."""

    id: str
    name: str
    role: str = "MEMBER"
    is_default: bool = True


class Account(BaseModel):
    """Who asks; the service knows no addresses."""

    id: str
    email: str = ""
    profile_picture: str = ""
    organizations: list[Organization]


class Balance(BaseModel):
    """The service sells nothing: there is always enough."""

    credits: float


class V2(Strict):
    """What all stable-image routes have."""

    prompt: str = Field(min_length=1, max_length=10_000)
    negative_prompt: str | None = Field(None, max_length=10_000)
    seed: V2_SEED
    output_format: Format
    style_preset: Style = None
    cfg_scale: float | None = Field(None, ge=0, le=35)
    model: str | None = Field(None, description="A name of the service's models; the default if left out.")
    steps: int | None = Field(None, ge=1, le=150, description="Extension.")


class Generate(V2):
    """POST /v2beta/stable-image/generate/{core|sd3|ultra}, beside its file."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a red fox", "aspect_ratio": "3:2", "seed": "7"}]}
    )

    mode: Literal["text-to-image", "image-to-image"] | None = Field(
        None, description="Left out: what the presence of an image says."
    )
    aspect_ratio: Literal["21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21"] | None = Field(
        None, description="Of a picture with about the model's own number of pixels. Not with an image."
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="Needed with an image: how much of it is made anew."
    )


class Inpaint(V2):
    """POST /v2beta/stable-image/edit/inpaint, beside its files."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a star", "grow_mask": "5"}]})

    grow_mask: int = Field(5, ge=0, le=100, description="Pixels by which the mask grows on all sides.")


class Picture(BaseModel):
    """The JSON answer of v2beta."""

    image: str
    finish_reason: Literal["SUCCESS"] = "SUCCESS"
    seed: int


class ErrorAnswer(BaseModel):
    """Any refusal; v1 reads `message`, v2beta `errors`."""

    id: str
    name: str
    message: str
    errors: list[str]
