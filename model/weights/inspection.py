"""`inspect_source`: what a checkpoint is and what is wrong with it, from its headers, without loading it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from ..config import Defaults, ModelConfig
from ..errors import CheckpointError
from .blueprint import recognise
from .checkpoint import Checkpoint, open_checkpoint
from .families import Options
from .keys import EMA_PREFIX
from .parts import Part
from .source import resolve


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One network of a checkpoint: its config's fields, number of parameters, and storage types by count."""

    dims: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        source, path: as given, and where it lies on this machine.
        layout: "single" or "folder".
        files: weight file (relative to `path` for a folder) to bytes.
        family, task, prediction_type, zero_terminal_snr, defaults: None when it was not recognised.
        prediction_decided_by: see `ModelConfig`.
        parts: by part name; empty when it was not recognised.
        ema: the file has a moving average of the UNet.
        metadata: header metadata of a single file, without the files that `convert` put there.
        problems: everything that would stop `load_model` and that headers show; empty is good. Values that
            are not finite show only when the data are read.
    """

    source: str
    path: str
    layout: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    family: str | None = None
    task: str | None = None
    prediction_type: str | None = None
    prediction_decided_by: str | None = None
    zero_terminal_snr: bool | None = None
    defaults: Defaults | None = None
    parts: dict[str, PartReport] = field(default_factory=dict)
    ema: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Parameters of all networks."""
        return sum(part.parameters for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"parameters": self.parameters}


def inspect_source(source: str, **options: Any) -> Inspection:
    """What `load_model(source, **options)` would find; never raises for what is wrong with the checkpoint.

    Raises:
        CheckpointError: an unknown option.
    """
    chosen = Options.of(options)
    path = source
    facts: dict[str, Any] = {}
    try:
        found = resolve(source)
        path = str(found)
        checkpoint = open_checkpoint(found)
        facts = _file_facts(checkpoint)
        for weights in checkpoint.weights.values():
            for file in weights.files:
                file.verify()
        blueprint = recognise(checkpoint, chosen)
    except CheckpointError as error:
        return Inspection(source=source, path=path, problems=[str(error)], **facts)
    problems = blueprint.problems().lines()
    facts |= _config_facts(blueprint.config)
    facts["parts"] = {name: _report(part) for name, part in blueprint.parts.items()}
    return Inspection(source=source, path=path, problems=problems, **facts)


def _file_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    root = checkpoint.path if checkpoint.layout == "folder" else checkpoint.path.parent
    keys = checkpoint.weights[""].entries if checkpoint.layout == "single" else ()
    return {
        "layout": checkpoint.layout,
        "files": {file.relative_to(root).as_posix(): file.stat().st_size for file in checkpoint.files()},
        "ema": any(key.startswith(f"{EMA_PREFIX}diffusion_model") for key in keys),
        "metadata": {k: v for k, v in checkpoint.metadata.items() if not k.startswith("diffray.")},
    }


def _config_facts(config: ModelConfig) -> dict[str, Any]:
    return {
        "family": config.family,
        "task": config.task,
        "prediction_type": config.noise.prediction_type,
        "prediction_decided_by": config.prediction_decided_by,
        "zero_terminal_snr": config.noise.zero_terminal_snr,
        "defaults": config.defaults,
    }


def _report(part: Part) -> PartReport:
    entries = part.stored.weights.entries
    dtypes: dict[str, int] = {}
    for rule in part.rules:
        if rule.file in entries:
            dtypes[entries[rule.file].dtype] = dtypes.get(entries[rule.file].dtype, 0) + 1
    return PartReport(
        dims=asdict(part.config), parameters=sum(prod(shape) for shape in part.shapes.values()), dtypes=dtypes
    )
