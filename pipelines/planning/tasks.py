"""What each kind of job needs of a row, what it assumes, and how it turns a source picture into a request.

generate   text to image; a row may bring `init_image`, `mask` and `depth`
augment    image to image: k variants of every source picture
inpaint    the white part of `mask` is painted anew, the rest pasted back; `mask_invert` keeps the white part
           instead, `mask_values` says which values of a class map are the mask
outpaint   the picture is continued by `left`, `top`, `right` and `bottom` pixels, or centred on a canvas of
           `width` x `height`; the canvas grows to the right and downwards to a size that the model has
edit       by an instruct-pix2pix model: the prompt says what to change
upscale    by a x4 upscaler, or by image-to-image at `scale` times the size with any other model
encode     pictures to latents of the autoencoder, for training sets
decode     and back
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.request import MAX_SIDE, ImageRequest

from ..config import InvalidJob, Task
from ..inputs.pictures import painted

PICTURE_FIELDS = ("init_image", "mask", "depth")
SIDES = ("left", "top", "right", "bottom")
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
"""Columns of a tar that hold its sample's picture."""
_ALL = ("text", "inpaint", "edit", "depth", "upscale")


@dataclass(frozen=True, slots=True)
class Kind:
    """The rules of one task.

    Attributes:
        needs: fields that every row brings.
        fields: fields of its own beside those of a request, with their types.
        defaults: what a row and the job need not say.
        models: tasks of the models that can do it.
    """

    task: Task
    needs: tuple[str, ...] = ("init_image",)
    fields: Mapping[str, pa.DataType] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("text",)

    @property
    def takes(self) -> tuple[str, ...]:
        """Fields that hold no plain value: source pictures, or latents."""
        if self.task == "decode":
            return ("latents",)
        return ("init_image",) if self.task == "encode" else PICTURE_FIELDS

    def sources(self, named: Collection[str]) -> tuple[str, ...]:
        """Those of `takes` that a job reads; `named` are the fields that it names itself.

        A mask or depth map that the task does not need is read only where the job names it: else a column of that
        name is a label like any other.
        """
        return tuple(name for name in self.takes if name in {*self.needs, "init_image", *named})

    def columns(self, name: str) -> tuple[str, ...]:
        """The columns where a field is looked for, in this order, unless the job says where it is."""
        if name == "init_image" and name in self.needs:
            return ("init_image", "image", "file_name", *ENDINGS)
        return ("prompt", "txt") if name == "prompt" else (name,)

    def check_model(self, model: ModelConfig, name: str) -> None:
        """Refuse a model that cannot do this.

        Raises:
            InvalidJob: naming both.
        """
        if model.task not in self.models:
            which = f"model {name}" if name else "the model"
            raise InvalidJob(
                f"task {self.task}: {which} is {model.family} {model.task}, needed is {' or '.join(self.models)}"
            )

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse values of this task's own fields.

        Raises:
            InvalidRequest: a value outside its range.
        """
        for name in SIDES:
            value = values.get(name)
            if value is not None and (type(value) is not int or not 0 <= value < MAX_SIDE):
                raise InvalidRequest(name, f"got {value!r}, allowed is an integer in 0..{MAX_SIDE - 1}")
        scale = values.get("scale")
        if scale is not None and (type(scale) not in (int, float) or not 1 < scale <= 8):
            raise InvalidRequest("scale", f"got {scale!r}, allowed is (1, 8]")
        classes = values.get("mask_values")
        if classes is not None and not all(type(v) is int and 0 <= v < 65536 for v in classes):
            raise InvalidRequest("mask_values", f"got {classes}, allowed are integers in 0..65535")

    def request(
        self,
        request: ImageRequest,
        own: Mapping[str, Any],
        pictures: Mapping[str, Image.Image],
        model: ModelConfig,
    ) -> ImageRequest:
        """The request with its pictures, made ready for this task.

        Args:
            own: values of this task's fields.
            pictures: by field; upright, in the modes of `pictures.py`.

        Raises:
            InvalidRequest: a picture is missing, or does not go with the others or the model.
        """
        for name in self.needs:
            if name not in pictures:
                raise InvalidRequest(name, "got nothing, this task needs one")
        if self.task == "outpaint":
            return _continued(request, own, pictures["init_image"], model)
        if self.task == "upscale":
            return _enlarged(request, own, pictures["init_image"], model)
        if "mask" in pictures:
            white = painted(pictures["mask"], own.get("mask_values")) != bool(own.get("mask_invert"))
            pictures = {**pictures, "mask": Image.fromarray(np.where(white, 255, 0).astype(np.uint8))}
        size = pictures["init_image"].size if "init_image" in pictures else None
        for name in ("mask", "depth"):
            if name in pictures and size is not None and not _same_shape(pictures[name].size, size):
                raise InvalidRequest(
                    name, f"got {pictures[name].size} pixels beside a picture of {size}: another shape"
                )
        values: dict[str, Any] = dict(pictures)
        return replace(request, **values)

    def offset(self, request: ImageRequest, own: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Where the source picture lies on what the image shows, from the left and the top."""
        return _margins(request, own, size)[:2] if self.task == "outpaint" else (0, 0)


LATENTS = {
    "latents_shape": pa.list_(pa.int64()),
    "latents_dtype": pa.string(),
    "latents_scale": pa.float64(),
}
"""What stands beside latents that are plain bytes."""


def _kinds() -> dict[Task, Kind]:
    whole, number = pa.int64(), pa.float64()
    mask = {"mask_invert": pa.bool_(), "mask_values": pa.list_(whole)}
    kinds = (
        Kind("generate", (), models=_ALL),
        Kind("augment", models=("text", "depth")),
        Kind("inpaint", ("init_image", "mask"), mask, {"paste_back": True}, ("text", "inpaint")),
        Kind(
            "outpaint",
            fields=dict.fromkeys(SIDES, whole),
            defaults={"prompt": "", "paste_back": True, "strength": 1.0},
            models=("text", "inpaint"),
        ),
        Kind("edit", models=("edit",)),
        Kind("upscale", fields={"scale": number}, defaults={"prompt": ""}, models=("text", "upscale")),
        Kind("encode", defaults={"prompt": ""}, models=_ALL),
        Kind("decode", ("latents",), LATENTS, {"prompt": ""}, _ALL),
    )
    return {kind.task: kind for kind in kinds}


KINDS = _kinds()


def _continued(
    request: ImageRequest, own: Mapping[str, Any], source: Image.Image, model: ModelConfig
) -> ImageRequest:
    """The source on a larger canvas, its border pixels stretched outwards, and the mask of what is new."""
    left, top, right, bottom = _margins(request, own, source.size)
    factor = model.vae.factor
    right += -(left + source.width + right) % factor
    bottom += -(top + source.height + bottom) % factor
    if not any((left, top, right, bottom)):
        raise InvalidRequest(
            "left", "nothing to add: give left, top, right, bottom, or a larger width or height"
        )
    pixels = np.pad(np.asarray(source), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.full(pixels.shape[:2], 255, np.uint8)
    mask[top : top + source.height, left : left + source.width] = 0
    width, height = left + source.width + right, top + source.height + bottom
    return replace(
        request, width=width, height=height, init_image=Image.fromarray(pixels), mask=Image.fromarray(mask)
    )


def _margins(
    request: ImageRequest, own: Mapping[str, Any], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Pixels to add on the left, at the top, on the right and at the bottom."""
    given = tuple(int(own.get(side) or 0) for side in SIDES)
    if any(given):
        left, top, right, bottom = given
        return left, top, right, bottom
    width, height = request.width or size[0], request.height or size[1]
    if width < size[0] or height < size[1]:
        raise InvalidRequest("width", f"got {width}x{height}, the picture has {size[0]}x{size[1]}")
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return left, top, width - size[0] - left, height - size[1] - top


def _enlarged(
    request: ImageRequest, own: Mapping[str, Any], source: Image.Image, model: ModelConfig
) -> ImageRequest:
    scale = own.get("scale")
    if model.task == "upscale":
        if scale not in (None, model.vae.factor):
            raise InvalidRequest("scale", f"got {scale}, this model's is {model.vae.factor}")
        return replace(request, width=None, height=None, init_image=source)
    factor = model.vae.factor
    width, height = (max(round(side * (scale or 2) / factor), 1) * factor for side in source.size)
    strength = UPSCALE_STRENGTH if request.strength is None else request.strength
    return replace(request, width=width, height=height, strength=strength, init_image=source)


UPSCALE_STRENGTH = 0.35
"""Of image-to-image upscaling: new detail, the same picture."""


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions, give or take a pixel of rounding."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)
