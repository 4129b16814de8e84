"""What a worker reads before it can make an image: source pictures, latents, and large values that it passes on."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest, JobError
from diffray.model.request import ImageRequest

from ..config import JobConfig
from ..terms.image import PlannedImage
from ..terms.schemas import SOURCE_COLUMN, digest_of
from ..terms.tasks import KINDS
from .blobs import Blobs
from .frames import Frame, kept
from .pictures import fitted, picture
from .preparation import offset_of, prepared
from .references import BlobError, Reference, StructReference
from .source import input_root

DTYPES = ("float16", "float32", "bfloat16")
_NPY = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class Ready:
    """An image that can be made."""

    image: PlannedImage
    """As planned, the values that were left in the input filled in."""
    request: ImageRequest
    """With its source pictures."""
    latents: npt.NDArray[np.float32] | None = None
    """What `decode` starts from, [C, h, w]."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Column of the plan to the SHA-256 of the source that it refers to."""
    frame: Frame | None = None
    """Where the source picture lies in the image."""

    def columns(self, width: int, height: int) -> dict[str, Any]:
        """What the row of an image of this size says about its sources."""
        own: dict[str, Any] = {digest_of(column): digest for column, digest in self.digests.items()}
        return own | (self.frame.columns(width, height) if self.frame else {})


def source_columns(config: JobConfig) -> dict[str, str]:
    """The picture fields, or latents, that a job reads, each with the column of the plan that refers to them."""
    sources = KINDS[config.task].sources([*config.columns, *config.templates])
    return {name: SOURCE_COLUMN.get(name, name) for name in sources}


class Sources:
    """Reads for one worker. Thread safe.

    Args:
        config: the job, with absolute paths.
        model: the worker's model.
        planned: fingerprint of the input that was planned, if there is a plan.
        folders: where the files that rows name by path were, each time that the job was planned.
    """

    def __init__(
        self,
        config: JobConfig,
        model: ModelConfig,
        planned: Sequence[Mapping[str, Any]] | None = None,
        folders: Collection[str] = (),
    ) -> None:
        self._config, self._model, self._planned, self._folders = config, model, planned, folders
        self._kind = KINDS[config.task]
        self._columns = source_columns(config)
        self._blobs: Blobs | None = None
        self._lock = threading.Lock()

    @property
    def moves(self) -> int:
        """Grows while something is read: a sign of life."""
        return self._blobs.moves if self._blobs else 0

    def needed(self, image: PlannedImage) -> bool:
        """Whether anything is to be read for an image."""
        values = image.user
        return any(values.get(column) is not None for column in self._columns.values()) or any(
            isinstance(value, Reference) for value in values.values()
        )

    def ready(self, image: PlannedImage) -> Ready:
        """Read and prepare everything for one image.

        Raises:
            InvalidRequest: a source that is missing, broken, too large, or that does not fit the request.
            JobError: the storage does not answer.
        """
        carried = {n: self._carried(n, v) for n, v in image.user.items() if isinstance(v, Reference)}
        found = replace(image, user={**image.user, **carried})
        request = image.request
        assert request is not None, "the plan's own rejections never come here"
        data = {
            name: read
            for name, column in self._columns.items()
            if (text := image.user.get(column)) is not None
            and (read := self._bytes(name, str(text), image.source_stamps.get(column))) is not None
        }
        digests = {self._columns[name]: hashlib.sha256(read).hexdigest() for name, read in data.items()}
        if self._kind.task == "decode":
            if "latents" not in data:
                raise InvalidRequest("latents", "got nothing, this task needs them")
            latents = _latents(data["latents"], image.user)
            height, width = (side * self._model.vae.factor for side in latents.shape[1:])
            return Ready(found, replace(request, width=width, height=height), latents, digests)
        rules = self._config.pictures
        upright = {name: picture(blob, name, rules) for name, blob in data.items()}
        pictures = fitted(upright, rules, request.width, request.height)
        if "init_image" not in pictures and request.strength is not None:
            request = replace(request, strength=None)  # the cell that could have held a picture is empty
        whole = prepared(self._kind, request, image.user, pictures, self._model)
        if whole.init_image is None:
            return Ready(found, whole, digests=digests)
        size, fit = upright["init_image"].size, pictures["init_image"].size
        part = kept(size, rules, request.width, request.height)
        offset = offset_of(self._kind, request, image.user, fit)
        return Ready(
            found, whole, digests=digests, frame=Frame.of(size, part, fit, offset, whole.init_image.size)
        )

    def _bytes(self, field: str, text: str, stamp: str | None = None) -> bytes | None:
        try:
            return self._opened().read(text, stamp)
        except BlobError as error:
            raise InvalidRequest(field, str(error)) from None

    def _opened(self) -> Blobs:
        """What is read from, once something is to be read."""
        with self._lock:
            if self._blobs is None:
                config, rules = self._config, self._config.pictures
                try:
                    root = input_root(config.inputs, config.storage_options)
                    self._blobs = Blobs(
                        root,
                        rules.root,
                        config.storage_options,
                        rules.max_bytes,
                        self._planned,
                        exact=all(folder == (rules.root or root) for folder in self._folders),
                        places=config.workers.shards_in_flight,
                    )
                except Exception as error:  # of any type: each storage's library has its own
                    raise JobError(f"input {', '.join(config.inputs)}: {error}") from error
            return self._blobs

    def _carried(self, column: str, reference: Reference) -> Any:
        data = self._bytes(column, reference)
        return {"bytes": data, "path": None} if data and isinstance(reference, StructReference) else data


def _latents(data: bytes, own: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """[C, h, w] of raw bytes with `latents_shape` and `latents_dtype` beside them, or of a .npy file."""
    try:
        if data.startswith(_NPY):
            array = _numpy(data)
        else:
            array = _raw(data, own.get("latents_dtype") or "float32", own.get("latents_shape"))
        if array.ndim != 3 or not array.size or array.dtype.kind != "f":
            raise ValueError(f"got {array.dtype} of shape {list(array.shape)}, allowed are floats [C, h, w]")
        return array.astype(np.float32)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest("latents", str(error)) from None


def _numpy(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file: a view of its bytes, so that no header can claim more than there is."""
    stream = io.BytesIO(data)
    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if by_columns else "C")


def _raw(data: bytes, dtype: str, shape: Any) -> npt.NDArray[Any]:
    if dtype not in DTYPES:
        raise ValueError(f"latents_dtype {dtype!r}, allowed are {', '.join(DTYPES)}")
    if not shape:
        raise ValueError("raw bytes need the columns latents_shape and latents_dtype")
    if dtype == "bfloat16":  # the upper half of a float32
        high = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return high.view(np.float32).reshape(shape)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
