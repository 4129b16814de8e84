"""Bodies and answers of AUTOMATIC1111's API. Keys that are not here are ignored, as it does itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAAAABJRU5ErkJggg=="
"""A picture of one black pixel, for examples."""


class Processing(BaseModel):
    """What both kinds of generation have. What is left out is the model's own default."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = Field(-1, description="-1 is a random one; the images of a request count up from it.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = Field(
        None, description="From /samplers; older names with a schedule work too."
    )
    sampler_index: str | None = Field(None, description="The older name of sampler_name.")
    scheduler: str | None = Field(None, description="From /schedulers.")
    batch_size: int = Field(1, ge=1, le=100)
    n_iter: int = Field(1, ge=1, le=100, description="Images are batch_size x n_iter.")
    denoising_strength: float | None = None
    eta: float | None = None
    override_settings: dict[str, Any] | None = Field(None, description="As POST /options, for this request.")
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    force_task_id: str | None = None

    styles: list[str] | None = Field(None, description="The service has none: must be empty.")
    subseed: int | None = -1
    subseed_strength: float | None = Field(0, description="Only 0.")
    seed_resize_from_h: int | None = Field(-1, description="Only 0 or -1.")
    seed_resize_from_w: int | None = Field(-1, description="Only 0 or -1.")
    restore_faces: bool | None = Field(None, description="Only false.")
    tiling: bool | None = Field(None, description="Only false.")
    s_min_uncond: float | None = Field(0, description="Only 0.")
    s_churn: float | None = Field(0, description="Only 0.")
    s_noise: float | None = Field(1, description="Only 1.")
    refiner_checkpoint: str | None = Field(None, description="Must be empty.")
    infotext: str | None = Field(None, description="Must be empty: send the parameters themselves.")
    script_name: str | None = Field(None, description="The service has no scripts: must be empty.")
    alwayson_scripts: dict[str, Any] | None = Field(None, description="Only scripts that are switched off.")


class TextToImage(Processing):
    """POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a large red circle on a blue background", "seed": 7},
                {
                    "prompt": "a red fox, (watercolor:1.2)",
                    "negative_prompt": "blurry",
                    "steps": 20,
                    "cfg_scale": 7,
                    "width": 512,
                    "height": 768,
                    "sampler_name": "DPM++ 2M",
                    "scheduler": "Karras",
                    "batch_size": 2,
                    "enable_hr": True,
                    "hr_scale": 1.5,
                    "hr_upscaler": "Latent",
                    "denoising_strength": 0.6,
                },
            ]
        }
    )

    enable_hr: bool = Field(False, description="A second pass at a higher resolution.")
    hr_scale: float = 2.0
    hr_resize_x: int = Field(0, ge=0, description="Width of the result instead of hr_scale.")
    hr_resize_y: int = Field(0, ge=0)
    hr_upscaler: str | None = Field(None, description="Latent, Latent (nearest-exact), Lanczos or None.")
    hr_second_pass_steps: int | None = Field(0, description="0 takes steps.")
    hr_checkpoint_name: str | None = Field(None, description="Must be empty, as all hr_* fields below.")
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""
    firstphase_width: int | None = Field(0, description="Only 0.")
    firstphase_height: int | None = Field(0, description="Only 0.")


class ImageToImage(Processing):
    """POST /sdapi/v1/img2img."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "init_images": [DOT],
                    "prompt": "a green triangle",
                    "denoising_strength": 0.75,
                    "mask": DOT,
                    "mask_blur": 4,
                    "inpainting_fill": 1,
                    "inpaint_full_res": True,
                    "inpaint_full_res_padding": 32,
                }
            ]
        }
    )

    init_images: list[str] = Field(
        min_length=1, description="base64 or data: URIs; one, or one per image of a batch."
    )
    resize_mode: int = Field(
        0, ge=0, le=3, description="0 stretch, 1 crop, 2 fill the edges; not 3 (latent)."
    )
    mask: str | None = Field(None, description="White is repainted.")
    mask_blur: float | None = Field(4, ge=0, le=256)
    mask_blur_x: float | None = Field(None, ge=0, le=256)
    mask_blur_y: float | None = Field(None, ge=0, le=256)
    inpainting_fill: int = Field(
        0, ge=0, le=3, description="0 fill from around, 1 original; 2 latent noise only at strength 1; not 3."
    )
    inpaint_full_res: bool = Field(True, description="Only the masked part, enlarged to width x height.")
    inpaint_full_res_padding: int = Field(0, ge=0, le=4096)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    initial_noise_multiplier: float | None = Field(None, description="Only 1.")
    image_cfg_scale: float | None = Field(None, description="For instruct-pix2pix models.")
    include_init_images: bool = False


class Generated(BaseModel):
    """`info` is JSON in a string; every image has its infotext inside as well."""

    images: list[str] = Field(description="base64, without a data: prefix.")
    parameters: dict[str, Any]
    info: str


class ProgressState(BaseModel):
    """Of the client's own images."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = ""
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """GET /sdapi/v1/progress, of the client that asks."""

    progress: float = Field(description="0 to 1; 0 where nothing runs.")
    eta_relative: float = Field(description="Seconds left, estimated.")
    state: ProgressState
    current_image: str | None = Field(default=None, description="base64 JPEG of the oldest image so far.")
    textinfo: str | None = None


class PngInfo(BaseModel):
    """POST /sdapi/v1/png-info."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": DOT}]})

    image: str = Field(min_length=1, description="base64 or a data: URI.")


class PngInfoAnswer(BaseModel):
    """What a picture says about its making."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, str]


class Extras(BaseModel):
    """Plain resizing; the service has no upscaling networks and no face restoration here."""

    model_config = ConfigDict(extra="ignore")

    resize_mode: Literal[0, 1] = Field(0, description="0 by upscaling_resize, 1 to upscaling_resize_w x _h.")
    upscaling_resize: float = Field(2, gt=0, le=8)
    upscaling_resize_w: int = Field(512, ge=1, le=16384)
    upscaling_resize_h: int = Field(512, ge=1, le=16384)
    upscaling_crop: bool = True
    upscaler_1: str = Field("None", description="From /upscalers; None leaves the picture as it is.")
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = Field(0, ge=0, le=1, description="Only 0.")
    gfpgan_visibility: float = Field(0, ge=0, le=1, description="Only 0.")
    codeformer_visibility: float = Field(0, ge=0, le=1, description="Only 0.")


class ExtrasSingle(Extras):
    """POST /sdapi/v1/extra-single-image."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": DOT, "upscaler_1": "Lanczos", "upscaling_resize": 4}]}
    )

    image: str = Field(min_length=1, description="base64 or a data: URI.")


class FileData(BaseModel):
    """A named picture."""

    data: str
    name: str = ""


class ExtrasBatch(Extras):
    """POST /sdapi/v1/extra-batch-images."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "imageList": [{"data": DOT, "name": "dot.png"}],
                    "upscaler_1": "Lanczos",
                    "resize_mode": 1,
                    "upscaling_resize_w": 64,
                    "upscaling_resize_h": 48,
                }
            ]
        }
    )

    image_list: list[FileData] = Field(alias="imageList", min_length=1, max_length=64)


class Resized(BaseModel):
    """One picture."""

    html_info: str = ""
    image: str


class ResizedBatch(BaseModel):
    """Several pictures."""

    html_info: str = ""
    images: list[str]


class ErrorAnswer(BaseModel):
    """Any refusal; `field` is ours."""

    error: str
    detail: str
    body: str = ""
    errors: str
    field: str | None = None
