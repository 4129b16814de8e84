"""Bodies and answers of the OpenAI Images API, with the extension fields that other open servers agree on."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Seeds = Annotated[
    int | list[int] | None,
    Field(description="One seed, counted up for n > 1, or one per image. Left out: a random one."),
]


class Lora(BaseModel):
    """An adapter of the model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="One of the model's `adapters` in /v1/models.")
    scale: float = Field(1.0, description="How strongly it works; 0 is without.")


def _several(value: object) -> object:
    """One adapter as a list of one, and JSON text, which forms have, as what it says."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("got text that is not JSON") from None
    return [value] if isinstance(value, dict) else value


Loras = Annotated[
    list[Lora] | None,
    BeforeValidator(_several),
    Field(description="Extension: adapters of the model; one of them may come without the list."),
]


class Common(BaseModel):
    """Fields of all three routes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="A name from /v1/models; the default model if left out.")
    n: Annotated[int, Field(ge=1, le=10)] | None = Field(None, description="Images to make; 1 if left out.")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
        description='"WIDTHxHEIGHT" or "auto": the model\'s own size, for edits in the proportions of the image.',
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json if left out; a url works without a key, for as long as results are kept."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png if left out.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp in percent; 100 if left out, which for webp is lossless."
    )
    background: Literal["opaque", "auto", "transparent"] | None = Field(
        None, description="These models paint every pixel: transparent is refused."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None,
        description="Steps, by the model's own number: low is half, high and hd are one and a half, xhigh and "
        "max twice as many; models of at most 8 steps stay. `num_inference_steps` wins.",
    )
    user: str | None = Field(
        None, description="Accepted; returned as `safety_identifier` where that is left out."
    )
    safety_identifier: str | None = Field(None, description="Accepted and returned.")

    negative_prompt: str | None = Field(None, description="Extension: what should not be there.")
    num_inference_steps: int | None = Field(None, description="Extension: sampler steps.")
    guidance_scale: float | None = Field(None, description="Extension: classifier-free guidance.")
    guidance_rescale: float | None = Field(None, description="Extension: Lin et al. 2023, 0..1.")
    clip_skip: int | None = Field(None, description="Extension: text layers skipped from the usual one.")
    seed: Seeds = None
    sampler: str | None = Field(
        None, description='Extension: such as "euler_ancestral" or "DPM++ 2M Karras".'
    )
    scheduler: str | None = Field(
        None, description='Extension: a noise schedule such as "karras", or a diffusers scheduler class.'
    )
    lora: Loras = None
    width: int | None = Field(None, description="Extension: instead of size.")
    height: int | None = Field(None, description="Extension: instead of size.")


class Streamed(Common):
    """What generations and edits have beyond variations."""

    prompt: str = Field(description="Text with weights `(word:1.2)`.")
    stream: bool | None = Field(None, description="Server-sent events instead of one JSON answer.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Pictures of the image so far, for each image of a stream."
    )


class Generation(Streamed):
    """POST /v1/images/generations."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a large red circle on a blue background", "size": "auto"},
                {
                    "prompt": "a red fox in the snow",
                    "negative_prompt": "blurry",
                    "n": 2,
                    "num_inference_steps": 20,
                    "guidance_scale": 6.5,
                    "sampler": "DPM++ 2M Karras",
                    "seed": 7,
                    "output_format": "webp",
                },
            ]
        }
    )

    moderation: Literal["low", "auto"] | None = Field(None, description="Accepted, not used.")
    style: Literal["vivid", "natural"] | None = Field(
        None, description="Accepted for DALL-E 3 clients, not used: describe the style in the prompt."
    )


class FromImage(Common):
    """What edits and variations have in common."""

    strength: float | None = Field(
        None, description="Extension: how much of the image is made anew, above 0 up to 1."
    )


class Edit(Streamed, FromImage):
    """POST /v1/images/edits, beside its files."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a green triangle", "strength": "0.9", "seed": "7"}]}
    )

    input_fidelity: Literal["low"] | None = Field(None, description="Only low; `strength` says it finely.")


class Variation(FromImage):
    """POST /v1/images/variations, beside its file."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"n": "2", "strength": "0.6"}]})

    prompt: str = Field("", description="Extension: what the variation should show.")


class InputDetails(BaseModel):
    """Of the prompt and the source image."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What was read and made: a text token is a word or a mark of the prompts, an image token one latent pixel."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImageData(BaseModel):
    """One image, and the seed that makes it again (extension)."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int


class Images(BaseModel):
    """The answer."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    usage: Usage
    safety_identifier: str | None = None


class Model(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffray"
    adapters: list[str] = Field([], description="Extension: what `lora` of a request may name.")


class Models(BaseModel):
    """All models, the default one first."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """The four keys that the SDK reads."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Any refusal."""

    error: ErrorBody
