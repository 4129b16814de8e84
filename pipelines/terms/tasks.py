"""What each kind of job needs of a row, and what it assumes.

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
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.request import MAX_SIDE

from ..config import InvalidJob, Task

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

UPSCALE_STRENGTH = 0.35
"""Of image-to-image upscaling: new detail, the same picture."""
