"""What many rows of a job share: their request fields but for texts, seed and pictures, checked once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from PIL import Image

from diffray.model.adapters.choices import check_known
from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.preparation import steps_of
from diffray.model.request import NEEDED_PICTURES, ImageRequest

from ..config import InvalidJob
from ..terms.tasks import PICTURE_FIELDS, UPSCALE_STRENGTH, Kind
from ..terms.values import REQUEST_COLUMNS, parsed, shown
from .sweeps import Variant

TEXTS = ("prompt", "negative_prompt")
REMEMBERED = 10_000
_PER_ROW = frozenset([*TEXTS, "seed", *PICTURE_FIELDS, "latents"])


@dataclass(frozen=True, slots=True)
class Settings:
    """One set of values.

    Attributes:
        model: name of the model.
        parameters: request fields as JSON; sizes are open where the source picture decides them.
        own: the task's own fields.
        work: pixel-steps, with the model's default size where the picture decides it.
    """

    model: str
    parameters: str
    own: Mapping[str, Any]
    work: float


class SettingsOf:
    """The settings of rows.

    Args:
        kind: the task.
        models: every model of the job by name.
        defaults: of the task and the job.
        adapters: names of each model's adapters.
        several: whether rows pick a model.

    Raises:
        InvalidJob: a model cannot do the task, or the defaults are not allowed.
    """

    def __init__(
        self,
        kind: Kind,
        models: Mapping[str, ModelConfig],
        defaults: Mapping[str, Any],
        *,
        adapters: Mapping[str, Sequence[str]],
        several: bool,
    ) -> None:
        self._kind, self._models, self._adapters, self._several = kind, models, adapters, several
        self._defaults = {name: value for name, value in defaults.items() if name not in _PER_ROW}
        self._known: dict[str, Settings | InvalidRequest] = {}
        for name, model in models.items():
            kind.check_model(model, name)
            try:
                self._check_alone(defaults, name)
            except InvalidRequest as error:
                raise InvalidJob(f"defaults: {error}") from None

    def check_sweep(self, variants: Sequence[Variant]) -> None:
        """Refuse a swept value with which no combination can be made.

        Raises:
            InvalidJob: naming the value, and what is allowed.
        """
        good: set[tuple[str, str]] = set()
        bad: dict[tuple[str, str], InvalidRequest] = {}
        for values in (variant.values for variant in variants):
            pairs = {name: (name, repr(value)) for name, value in values.items()}
            if good.issuperset(pairs.values()):
                continue
            # What only the defaults contradict is its row's matter, which may say something else than they do.
            for base, model in product((self._defaults, {}), self._models):
                try:
                    self._check_alone({**base, **values}, model)
                    good.update(pairs.values())
                except InvalidRequest as error:
                    if error.field in pairs:
                        bad.setdefault(pairs[error.field], error)
        if wrong := next((pair for pair in bad if pair not in good), None):
            raise InvalidJob(f"sweep.{wrong[0]}: {bad[wrong].reason}")

    def _check_alone(self, values: Mapping[str, Any], model: str) -> None:
        """Refuse values that are not allowed together, whatever a row brings."""
        texts = {n: parsed(n, values[n]) for n in (*TEXTS, "seed") if values.get(n) is not None}
        ImageRequest(**texts)
        others = {name: value for name, value in values.items() if name not in _PER_ROW}
        image = ("init_image",) if "strength" in values else ()
        sources = {*self._kind.needs, *NEEDED_PICTURES.get(self._models[model].task, image)}
        self._checked({**({"model": model} if self._several else {}), **others}, sources)

    def of(
        self,
        given: Mapping[str, Any],
        variant: Variant,
        sources: tuple[str, ...],
        variables: Sequence[str],
        *,
        certain: bool = True,
    ) -> Settings:
        """The settings of a row.

        Args:
            given: the row's own values.
            variant: the combination of swept values.
            sources: which pictures the row brings.
            variables: swept names that are no fields.
            certain: whether these pictures are there; the cell of a table may be empty.

        Raises:
            InvalidRequest: a value that is not allowed, or values that leave no step to run.
        """
        own = {name: value for name, value in given.items() if name not in _PER_ROW}
        key = f"{variant.id}{sources}{certain}{own}"
        found = self._known.get(key)
        if found is None:
            skipped = _PER_ROW.union(variables)
            swept = {name: value for name, value in variant.values.items() if name not in skipped}
            base = dict(self._defaults)
            if "init_image" not in sources:
                base.pop("strength", None)  # it speaks of rows that have a source picture
            try:
                found = self._checked({**base, **own, **swept}, sources, whole=certain)
            except InvalidRequest as error:
                found = error
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = found
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.field, found.reason)
        return found

    def _checked(self, values: dict[str, Any], sources: Collection[str], *, whole: bool = False) -> Settings:
        """The settings; `whole` says that nothing is added to the values, so that their steps must work out."""
        name = values.pop("model", next(iter(self._models))) if self._several else ""
        if name not in self._models:
            raise InvalidRequest("model", f"got {shown(name)}, allowed is one of {', '.join(self._models)}")
        model, fields = self._models[name], self._kind.fields
        own = {n: parsed(n, values[n], fields[n]) for n in fields if values.get(n) is not None}
        self._kind.check(own)
        plain = {n: parsed(n, v) for n, v in values.items() if n in REQUEST_COLUMNS and v is not None}
        enlarged = self._kind.task == "upscale" and model.task == "text"
        if enlarged:
            plain.setdefault("strength", UPSCALE_STRENGTH)
        request = ImageRequest(**plain)
        check_known(request.adapters, self._adapters[name])
        if request.output != "image":
            raise InvalidRequest("output", f"got {request.output!r}, a batch job makes images")
        if self._kind.task in ("encode", "decode"):
            planned, work = request, float(model.defaults.width * model.defaults.height)
        else:
            planned, work = self._trial(request, model, sources, whole=whole)
            work *= float(own.get("scale", 2)) ** 2 if enlarged else 1.0
        parameters = {n: v for n, v in planned.parameters().items() if n not in (*TEXTS, "seed")}
        return Settings(name, json.dumps(parameters), own, work)

    def _trial(
        self, request: ImageRequest, model: ModelConfig, sources: Collection[str], *, whole: bool
    ) -> tuple[ImageRequest, float]:
        """The request resolved with blank pictures in place of its sources, and its work."""
        names = {name for name in PICTURE_FIELDS if name in sources}
        if self._kind.task == "outpaint":
            names.add("mask")
        shrunk = model.vae.factor if model.task == "upscale" else 1
        blank = Image.new("1", (model.defaults.width // shrunk, model.defaults.height // shrunk))
        pictures: dict[str, Any] = dict.fromkeys(names, blank)
        resolved = replace(request, **pictures).resolved(model)
        if whole:
            steps_of(model, resolved)
        if not names:
            return resolved, resolved.cost * 1e6
        open_again: dict[str, Any] = {
            **dict.fromkeys(names),
            "width": request.width,
            "height": request.height,
            "original_size": request.original_size,
            "target_size": request.target_size,
        }
        return replace(resolved, **open_again), resolved.cost * 1e6
