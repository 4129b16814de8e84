"""What is looked at in every prompt and picture: values become columns, what is refused becomes a rejected row.

The columns, in this order, as far as the job's `checks` switch them on:

    blank, brightness, contrast, sharpness    `diffray.model.judges.checks.measure`
    phash                                     the same; also for near duplicates
    clip_score                                `diffray.model.judges.alignment`
    nsfw, nsfw_score                          `diffray.model.judges.safety`
    whatever the job's own scorers declare

Everything here runs beside the engine, in the threads that encode.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from PIL import Image

from diffray.model.errors import GenerationError
from diffray.model.judges.checks import PromptFilter, is_blank, measure
from diffray.model.request import ImageRequest

from .checks import MEASURES, NETWORKS, Checks, Scorer
from .strict import InvalidJob

TYPES = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "text": pa.string()}

Score = Callable[[Image.Image, ImageRequest], Mapping[str, Any]]


class Refused(GenerationError):
    """A picture that is not to be written.

    Attributes:
        column: the column that decided, None where a scorer failed.
        reason: what was got and what is allowed.
    """

    def __init__(self, column: str | None, reason: str) -> None:
        super().__init__(f"{column}: {reason}" if column else reason)
        self.column, self.reason = column, reason


def columns(checks: Checks) -> dict[str, pa.DataType]:
    """The score columns of a job and their types."""
    kinds = dict(MEASURES) if checks.measures else {}
    if checks.near_duplicates is not None:
        kinds["phash"] = "text"
    if checks.clip:
        kinds["clip_score"] = "float"
    if checks.safety:
        kinds |= {"nsfw": "bool", "nsfw_score": "float"}
    for scorer in checks.scorers:
        kinds |= dict(scorer.columns)
    return {name: TYPES[kind] for name, kind in kinds.items()}


def facts(checks: Checks) -> dict[str, str]:
    """What decides the scores besides the config: checksums of models and of the scorers' source.

    Raises:
        InvalidJob: a scorer cannot be imported.
        CheckpointError: a model cannot be found.
    """
    from diffray.model.judges.vision import weights_checksum

    found = {source: weights_checksum(source) for source in (checks.clip, checks.safety) if source}
    for scorer in checks.scorers:
        target = _target(scorer)
        try:
            source = inspect.getsource(inspect.getmodule(target) or target)
        except (OSError, TypeError):
            source = repr(target)  # built in, or typed into a console
        found[scorer.call] = hashlib.sha256(source.encode()).hexdigest()
    return found


class Examiner:
    """Looks at the prompts and pictures of one worker. Thread safe.

    Raises:
        InvalidJob: a scorer cannot be imported or made.
        CheckpointError: a model cannot be loaded.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._filter = PromptFilter(checks.block)
        self.columns = columns(checks)
        self._scorers: list[tuple[Scorer, Score]] = []
        if checks.clip:
            from diffray.model.judges.alignment import ClipScore

            clip = ClipScore(checks.clip)
            about = _built_in("alignment:ClipScore", "clip_score")
            self._scorers.append((about, lambda image, request: {"clip_score": clip(image, request.prompt)}))
        if checks.safety:
            from diffray.model.judges.safety import SafetyChecker

            safety = SafetyChecker(checks.safety)
            about = _built_in("safety:SafetyChecker", "nsfw", "nsfw_score")
            self._scorers.append((about, lambda image, _: asdict(safety(image))))
        self._scorers += [(scorer, _made(scorer)) for scorer in checks.scorers]
        self._turn = threading.Lock()

    def guard(self, request: ImageRequest) -> str | None:
        """Why a request must not reach the engine; None when it may. The negative prompt is not looked at."""
        term = self._filter.match(request.prompt)
        return None if term is None else f"contains {term!r}, which the job's block-list refuses"

    def examine(self, image: Image.Image, request: ImageRequest) -> dict[str, Any]:
        """The scores of a picture, by column.

        Raises:
            Refused: the picture is not to be written.
            Exception: `broken`.
        """
        checks = self._checks
        if checks.blank == "reject" and is_blank(image, checks.blank_tolerance):
            raise Refused("blank", f"all pixels are {_colour(image)}, a blank picture is refused")
        scores: dict[str, Any] = {}
        if "phash" in self.columns:
            figures = asdict(measure(image))
            scores |= {name: figures[name] for name in MEASURES if name in self.columns}
            if "blank" in scores:
                scores["blank"] = is_blank(image, checks.blank_tolerance)
        for scorer, score in self._scorers:
            with self._turn:  # models and other people's code are not asked from two threads at once
                scores |= _asked(scorer, score, image, request)
        for name, (least, most) in checks.limits.items():
            _within(name, scores.get(name), least, most)
        if checks.flagged == "reject" and scores.get("nsfw"):
            raise Refused("nsfw", "the safety checker flags it")
        return scores


def broken(error: Exception) -> bool:
    """Whether an error says that this process can use its device no more; then it is no picture's own."""
    return "CUDA error" in str(error)


def _built_in(call: str, *names: str) -> Scorer:
    """What a job would say of one of our own models: a picture that it cannot judge is refused."""
    kinds: dict[str, Any] = {name: NETWORKS[name] for name in names}
    return Scorer(call=f"diffray.model.judges.{call}", columns=kinds, on_error="reject")


def _asked(scorer: Scorer, score: Score, image: Image.Image, request: ImageRequest) -> dict[str, Any]:
    """The values of one scorer, as its columns' types. It may fail as it likes."""
    try:
        values = _with_room(score, image.copy(), request)
        return {name: _typed(name, values[name], kind) for name, kind in scorer.columns.items()}
    except Exception as error:
        if broken(error):
            raise
        if scorer.on_error == "reject":
            text = f"{scorer.call} failed: {type(error).__name__}: {error}"
            raise Refused(None, text[:2000]) from error
        return dict.fromkeys(scorer.columns)


def _with_room(score: Score, image: Image.Image, request: ImageRequest) -> Mapping[str, Any]:
    """What a scorer says; asked twice where the device's memory, which the engine shares, did not suffice."""
    import torch

    try:
        return score(image, request)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return score(image, request)


def _typed(name: str, value: Any, kind: str) -> Any:
    if value is None:
        return None
    plain: Any = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    wanted = {"float": (int, float), "int": (int,), "bool": (bool,), "text": (str,)}[kind]
    if not isinstance(plain, wanted) or (isinstance(plain, bool) and kind != "bool"):
        raise TypeError(f"{name}: got {type(plain).__name__}, declared is {kind}")
    if kind != "float":
        return plain
    real = float(plain)
    return real if math.isfinite(real) else None


def _within(name: str, value: Any, least: float | None, most: float | None) -> None:
    if value is None:
        return
    if (least is not None and value < least) or (most is not None and value > most):
        low, high = ("-inf" if least is None else f"{least:g}"), ("inf" if most is None else f"{most:g}")
        raise Refused(name, f"got {value:g}, allowed is {low}..{high}")


def _colour(image: Image.Image) -> str:
    pixel = image.convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return "#" + "".join(f"{int(level):02x}" for level in pixel)


def _target(scorer: Scorer) -> Any:
    module, _, name = scorer.call.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidJob(f"scorer {scorer.call}: {type(error).__name__}: {error}") from error


def _made(scorer: Scorer) -> Score:
    """A function with its options, or an object of a class, made once."""
    target = _target(scorer)
    if not inspect.isclass(target):
        return functools.partial(target, **scorer.options)
    try:
        made: Any = target(**scorer.options)
    except Exception as error:
        shown = json.dumps(scorer.options, default=str)
        raise InvalidJob(f"scorer {scorer.call}({shown}): {type(error).__name__}: {error}") from error
    score: Score = made
    return score
