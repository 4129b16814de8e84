"""Generation as a stage of anybody's Ray Data job: Dataset in, Dataset out, in the style of `ray.data.llm`.

    processor = build_processor(ProcessorConfig(defaults={"steps": 20}), preprocess=lambda row: {"prompt": row["text"]})
    processor(ray.data.read_parquet("s3://bucket/prompts")).write_parquet("s3://bucket/images")

For jobs that must be exact under crashes use `diffray.pipelines.run`: this stage leaves commits to the caller.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image
from pydantic import Field

from diffray.model.adapters.choices import check_known
from diffray.model.encoding import encode_image
from diffray.model.errors import DiffrayError, InvalidRequest
from diffray.model.request import ImageRequest

from .checks import Checks
from .config import InvalidJob, Strict
from .hashing import content_checksum
from .inputs.pictures import fitted, picture
from .inputs.preparation import prepared
from .models import Models
from .options import Encoding, ModelOptions, Pictures
from .planning.rows import derived_seed
from .scores import Examiner, broken
from .terms.tasks import KINDS, PICTURE_FIELDS
from .terms.values import REQUEST_COLUMNS, request_from

if TYPE_CHECKING:
    from ray.data import Dataset

ERROR = "__inference_error__"
Row = dict[str, Any]


class ProcessorConfig(Strict):
    """How rows become images."""

    model: ModelOptions = ModelOptions()
    defaults: dict[str, Any] = Field(default={})
    """Request fields for rows that do not say."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """For rows without a `seed`: mixed with the row's `id`, or, where it has none, with its whole content, source
    pictures and columns that are only carried along included. Rows that are equal in every column become the same
    image."""
    encoding: Encoding = Encoding()
    checks: Checks = Checks()
    """As in a job: scores become columns, what is refused becomes an error. Near duplicates need a whole job."""
    pictures: Pictures = Pictures()
    """Rules for the source pictures `init_image`, `mask` and `depth`. They come as bytes, so `root` is not used."""
    batch_size: int = Field(default=32, ge=1)
    """Rows that come back together."""
    max_concurrent_batches: int = Field(default=4, ge=1)
    """Batches that one actor works on at once, so that its engine never runs dry between two."""
    concurrency: int | tuple[int, int] = 1
    """Number of actors, or the least and the most."""
    gpus: float = Field(default=0.0, ge=0)
    cpus: float = Field(default=1.0, gt=0)
    """What each actor takes."""
    accelerator_type: str | None = None
    """Only nodes with this accelerator, by Ray's name for it."""
    label_selector: dict[str, str] = Field(default={})
    """Only nodes with these Ray labels."""
    should_continue_on_error: bool = False
    """Put a row's error into the column `__inference_error__` (empty where all is well) instead of failing. Rows that
    come with an error there, from a stage before, keep it and are not made."""


class Processor:
    """Call it with a Dataset. Every row comes back with the columns `image` (bytes and path), `sha256`, all request
    parameters, the scores of its checks and `__inference_error__`."""

    def __init__(
        self,
        config: ProcessorConfig,
        preprocess: Callable[[Row], Row] | None,
        postprocess: Callable[[Row], Row] | None,
        preprocess_options: dict[str, Any],
        postprocess_options: dict[str, Any],
        models: Models,
    ) -> None:
        self._config, self._models = config, models
        self._preprocess, self._postprocess = preprocess, postprocess
        self._preprocess_options, self._postprocess_options = preprocess_options, postprocess_options

    def __call__(self, dataset: Dataset) -> Dataset:
        from ray.data import ActorPoolStrategy

        config = self._config
        where: dict[str, Any] = {}
        if config.accelerator_type:
            where["accelerator_type"] = config.accelerator_type
        if config.label_selector:
            where["label_selector"] = config.label_selector
        least, most = (config.concurrency,) * 2 if isinstance(config.concurrency, int) else config.concurrency
        if self._preprocess is not None:
            dataset = dataset.map(_added(self._preprocess), **self._preprocess_options)
        dataset = dataset.map_batches(
            Generator,
            fn_constructor_args=(config, self._models),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_tasks_in_flight_per_actor=2 * config.max_concurrent_batches,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
            ),
            num_cpus=None if config.gpus else config.cpus,
            num_gpus=config.gpus or None,
            **where,
        )
        if self._postprocess is None:
            return dataset
        return dataset.map(
            _unless_failed(self._postprocess, marked=config.should_continue_on_error),
            **self._postprocess_options,
        )


def build_processor(
    config: ProcessorConfig,
    preprocess: Callable[[Row], Row] | None = None,
    postprocess: Callable[[Row], Row] | None = None,
    preprocess_map_kwargs: dict[str, Any] | None = None,
    postprocess_map_kwargs: dict[str, Any] | None = None,
    *,
    models: Models | None = None,
) -> Processor:
    """A generation stage for Ray Datasets.

    Args:
        config: model, defaults and resources.
        preprocess: request fields (`prompt`, `steps`, ...) and other columns that are added to a row; its own stay,
            and are read too if they are named like a field (`width`: None leaves such a one alone).
            `init_image`, `mask` and `depth` are image files: bytes, or structs with `bytes`.
        postprocess: maps every row that has an image; failed rows pass by it unchanged. With
            `should_continue_on_error` what it returns gets an empty `__inference_error__`.
        preprocess_map_kwargs, postprocess_map_kwargs: further arguments of these two `Dataset.map` calls.
        models: opens the model; another one lets a stage run on an engine of one's own.

    Raises:
        InvalidJob: a default is no request field, or has a value that no row may have.
    """
    _check_defaults(config)
    return Processor(
        config,
        preprocess,
        postprocess,
        preprocess_map_kwargs or {},
        postprocess_map_kwargs or {},
        models or Models(),
    )


def _check_defaults(config: ProcessorConfig) -> None:
    """What can be said of the defaults without the model."""
    try:
        request = request_from(config.defaults)
        check_known(request.adapters, sorted(config.model.adapters))
        if request.output != "image":
            raise InvalidRequest("output", f"got {request.output!r}, allowed is 'image'")
    except InvalidRequest as error:
        raise InvalidJob(f"defaults.{error}") from None


class Generator:
    """The class that Ray Data runs in an actor: one engine, all rows of a batch in flight at once."""

    def __init__(self, config: ProcessorConfig, models: Models) -> None:
        self._config, self._model_config = config, models.config(config.model)
        self._examiner = Examiner(config.checks)
        self._schema = _schema(self._examiner.columns)
        self._model = models.open(config.model)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = batch.to_pylist()
        made = await asyncio.gather(*(self._one(row) for row in rows))
        carried = [name for name in batch.column_names if name not in self._schema.names]
        table = pa.Table.from_pylist(made, self._schema)
        for name in carried:
            table = table.append_column(batch.schema.field(name), batch.column(name))
        yield table

    async def _one(self, row: Row) -> Row:
        if earlier := row.get(ERROR):
            return _failed(row, earlier)
        given = {name: row[name] for name in REQUEST_COLUMNS if row.get(name) is not None}
        try:
            request = await asyncio.to_thread(self._request, row, given)
            if refusal := self._examiner.guard(request):
                raise InvalidRequest("prompt", refusal)
            result = await asyncio.wrap_future(self._model.engine.submit(request).future)
            if result.image is None:
                raise DiffrayError("output: got 'latents', this stage makes images")
            data, scores = await asyncio.to_thread(self._finished, result.image, result.request)
        except Exception as error:
            if not self._config.should_continue_on_error or self._model.broken is not None or broken(error):
                raise
            return _failed(row, f"{type(error).__name__}: {error}")
        image = {"bytes": data, "path": None}
        digest = hashlib.sha256(data).hexdigest()
        return {**result.request.parameters(), **scores, "image": image, "sha256": digest, ERROR: ""}

    def _request(self, row: Row, given: Row) -> ImageRequest:
        values = {**self._config.defaults, **given, "seed": self._seed(row, given)}
        if values.get("prompt") is None:
            raise InvalidRequest("prompt", "got nothing, every row needs one (it may be empty)")
        request = request_from(values)
        rules = self._config.pictures
        data = {name: _file(name, row[name]) for name in PICTURE_FIELDS if row.get(name) is not None}
        if not data:
            return request
        pictures = {name: picture(file, name, rules) for name, file in data.items()}
        pictures = fitted(pictures, rules, request.width, request.height)
        return prepared(KINDS["generate"], request, row, pictures, self._model_config)

    def _finished(self, image: Image.Image, request: ImageRequest) -> tuple[bytes, Row]:
        """A picture looked at and encoded; runs in a thread."""
        encoding, model = self._config.encoding, self._model
        scores = self._examiner.examine(image, request)
        data = encode_image(
            image,
            request,
            format=encoding.format,
            quality=encoding.quality,
            model=model.name,
            model_checksum=model.checksum,
            adapter_checksums=model.adapters,
        )
        return data, scores

    def _seed(self, row: Row, given: Row) -> Any:
        for values in (given, self._config.defaults):
            if values.get("seed") is not None:
                return values["seed"]
        name = row.get("id")
        return derived_seed(self._config.seed, content_checksum(row) if name in (None, "") else str(name))


def _schema(scores: Mapping[str, pa.DataType]) -> pa.Schema:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [
            ("image", image),
            ("sha256", pa.string()),
            *REQUEST_COLUMNS.items(),
            *scores.items(),
            (ERROR, pa.string()),
        ]
    )


def _file(field: str, value: Any) -> bytes:
    """An image file as it stands in a cell: bytes, or a struct of Hugging Face's with bytes in it."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise InvalidRequest(field, f"got {type(data).__name__}, allowed are an image file's bytes")
    return data


def _failed(row: Row, error: str) -> Row:
    prompt = row.get("prompt")
    return {"prompt": prompt if isinstance(prompt, str) else None, ERROR: error}


def _added(preprocess: Callable[[Row], Row]) -> Callable[[Row], Row]:
    def mapped(row: Row) -> Row:
        return {**row, **preprocess(row)}

    return mapped


def _unless_failed(postprocess: Callable[[Row], Row], *, marked: bool) -> Callable[[Row], Row]:
    def mapped(row: Row) -> Row:
        if row[ERROR]:
            return row
        return {**postprocess(row), ERROR: ""} if marked else postprocess(row)

    return mapped
