"""One adapter file: what it changes, checked against a model by its header, its factors read on demand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..weights.blueprint import Blueprint
from ..weights.checkpoint import parse_json
from ..weights.keys import Shape
from ..weights.kinds import kind_of
from ..weights.parts import Problems
from ..weights.safefile import FLOATS, WeightFile
from ..weights.source import resolve
from .choices import NAME, NAMES
from .deltas import Kind, check_shapes, dense, kind_of_factors, rank
from .names import Place, module_names, other_family, spelled

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's config in a header: JSON, with keys such as "unet.lora_alpha"."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What an adapter does to one module.

    Attributes:
        keys: factor to tensor name.
        kind: how they change the weight; None where only the bias changes.
        scale: alpha / rank; None where alpha is a tensor of the file.
        rank: None for a kind without one.
    """

    keys: Mapping[str, str]
    kind: Kind | None
    scale: float | None
    rank: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A change with its factors, on the CPU in the file's type."""

    kind: Kind | None
    factors: Mapping[str, Tensor]
    scale: float

    @property
    def bytes(self) -> int:
        """Memory of the factors."""
        return sum(tensor.nbytes for tensor in self.factors.values())

    def tensors(self, module: str) -> list[str]:
        """The folder tensors of `module` that it changes."""
        leaves = (("weight", self.kind is not None), ("bias", "diff_b" in self.factors))
        return [f"{module}.{leaf}" for leaf, changed in leaves if changed]

    def of(self, tensor: str, base: Tensor) -> Tensor:
        """What is added to `base` at adapter weight 1, on its device.

        Args:
            tensor: one of `tensors`.
            base: it without adapters, float32.
        """
        if tensor.endswith(".bias"):
            return self.factors["diff_b"].to(base.device).float()
        assert self.kind is not None
        factors = {leaf: factor.to(base.device).float() for leaf, factor in self.factors.items()}
        return dense(self.kind, factors, self.scale, base)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What there is to say about an adapter.

    Attributes:
        name: the one that requests use.
        kinds: those of "LoRA", "LoHa", "LoKr", "full" and "DoRA" that occur.
        rank: the largest.
        parts: of the model that it changes: "unet", "text_encoder", "text_encoder_2".
        bytes: of its file.
        metadata: free text of the file's header, as its maker left it.
    """

    name: str
    kinds: tuple[str, ...]
    rank: int | None
    parts: tuple[str, ...]
    bytes: int
    metadata: Mapping[str, str]


class Adapter:
    """An adapter that fits a model.

    Args:
        name: the one that requests use.
        file: its header is read, no data.
        blueprint: of the model.
        names: `module_names` of the model.

    Raises:
        CheckpointError: the file is no adapter, or not one for this model; names file, tensors and what was got.
    """

    def __init__(self, name: str, file: WeightFile, blueprint: Blueprint, names: Mapping[str, Place]) -> None:
        file.verify()
        file.close()
        self.name = name
        self.file = file
        self.changes = _changes(file, blueprint, names)
        self.parts = frozenset(place.part for place in self.changes)

    @property
    def info(self) -> AdapterInfo:
        """What there is to say about it."""
        changes = self.changes.values()
        kinds = {change.kind.name for change in changes if change.kind is not None}
        if any({"dora_scale", "magnitude"} & change.keys.keys() for change in changes):
            kinds.add("DoRA")
        most = max((change.rank or 0 for change in changes), default=0)
        parts, size = tuple(sorted(self.parts)), self.file.stat[0]
        return AdapterInfo(self.name, tuple(sorted(kinds)), most or None, parts, size, self.file.metadata)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the file."""
        return file_checksum(self.file)

    def read(self) -> dict[Place, Loaded]:
        """All its changes, in memory of their own.

        Raises:
            CheckpointError: a value is not finite, or the file was replaced since it was opened.
        """
        self.file.check_unchanged()
        broken = Problems()
        loaded = {}
        for place, change in self.changes.items():
            factors = {leaf: self.file.read(key).clone() for leaf, key in change.keys.items()}
            for leaf, tensor in factors.items():
                if not bool(tensor.float().isfinite().all()):
                    broken.not_finite.append(change.keys[leaf])
            alpha, scale = factors.pop("alpha", None), change.scale
            if scale is None:
                scale = 1.0 if alpha is None or change.rank is None else float(alpha) / change.rank
            loaded[place] = Loaded(change.kind, factors, scale)
        self.file.close()
        broken.check(self.file.path)
        return loaded


def open_adapters(sources: Mapping[str, str]) -> dict[str, WeightFile]:
    """The files of adapters by name, headers read.

    Raises:
        CheckpointError: a name that is not allowed, or a file that cannot be found or read.
        UnsafeCheckpoint: it is a pickle.
    """
    found = {}
    for name, source in sources.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(f"adapter {name!r:.200}: a name is {NAMES}")
        path = resolve(source)
        if path.is_dir():
            raise CheckpointError(f"adapter {name}: {path} is a folder, allowed is a safetensors file")
        found[name] = WeightFile(path)
    return found


def fitting_adapters(sources: Mapping[str, str], blueprint: Blueprint) -> dict[str, Adapter]:
    """The adapters by name, each checked against the model; no data is read.

    Raises:
        CheckpointError: as `open_adapters` and `Adapter`.
    """
    files = open_adapters(sources)
    names = module_names(blueprint.parts) if files else {}
    return {name: Adapter(name, file, blueprint, names) for name, file in files.items()}


def adapter_checksums(sources: Mapping[str, str]) -> dict[str, str]:
    """sha256 of each adapter's file, by name, without a model.

    Raises:
        CheckpointError: as `open_adapters`.
    """
    return {name: file_checksum(file) for name, file in open_adapters(sources).items()}


def file_checksum(file: WeightFile) -> str:
    """sha256 of an adapter's file, the number that model hubs publish.

    Raises:
        CheckpointError: it was replaced since it was opened.
    """
    file.check_unchanged()
    with file.path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _changes(file: WeightFile, blueprint: Blueprint, names: Mapping[str, Place]) -> dict[Place, Change]:
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    problems = Problems()
    modules = dict(_modules(file, names, problems))
    if not modules and not any(map(spelled, shapes)):
        what = kind_of(shapes) or f"of no known kind (its first tensors are {_first(shapes)})"
        raise CheckpointError(f"{file.path}: this is {what}; supported are LoRA, LoHa, LoKr and full changes")
    scales = parse_json(file.metadata[METADATA], str(file.path)) if METADATA in file.metadata else {}
    changes = {}
    for place, keys in modules.items():
        own, folder = {leaf: shapes[key] for leaf, key in keys.items()}, blueprint.parts[place.part].shapes
        try:
            kind = kind_of_factors(own)
            check_shapes(kind, own, folder[f"{place.module}.weight"], folder.get(f"{place.module}.bias"))
        except CheckpointError as error:
            problems.misshapen.append(f"{next(iter(keys.values()))} ({error})")
            continue
        inner = None if kind is None else rank(kind, own)
        changes[place] = Change(keys, kind, None if "alpha" in own else _scale(scales, place, inner), inner)
    if problems.lines() and (family := other_family(shapes, blueprint.config.unet.context_dim)):
        raise CheckpointError(
            f"{file.path}: an adapter for {family}, this model is {blueprint.config.family}"
        )
    problems.check(file.path)
    return changes


def _modules(
    file: WeightFile, names: Mapping[str, Place], problems: Problems
) -> Iterator[tuple[Place, dict[str, str]]]:
    """Tensor names by module and factor; what fits no module goes to `problems`."""
    modules: dict[Place, dict[str, str]] = {}
    for key, entry in file.entries.items():
        name, leaf = spelled(key) or ("", "")
        place = names.get(name)
        if place is None or leaf in modules.get(place, {}):
            problems.unexpected.append(key)
        elif entry.dtype not in FLOATS and leaf != "alpha":
            problems.misshapen.append(f"{key} (got type {entry.dtype}, wanted floats)")
        else:
            modules.setdefault(place, {})[leaf] = key
    yield from modules.items()


def _scale(config: Mapping[str, Any], place: Place, inner: int | None) -> float | None:
    """alpha / rank as peft's config in the header says it, None where it does not."""

    def said(name: str) -> Any:
        return config.get(f"{place.part}.{name}")

    alpha = said("lora_alpha")
    patterns = said("alpha_pattern")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        if place.module == pattern or place.module.endswith(f".{pattern}"):
            alpha = own
    if inner is None or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        return None
    scale = alpha / (math.sqrt(inner) if said("use_rslora") else inner)
    return scale if math.isfinite(scale) else None


def _first(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(sorted(shapes)[:5]) or "none"
