"""A checkpoint on disk: which files it has, what is in their headers, and their small configs.

A single file and a diffusers folder become the same value. A single file that `diffray convert` wrote carries
the folder's own JSON files in its header metadata (`diffray.<relative path>`), so both tell equally much.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, UnsafeCheckpoint
from ..networks.tokenizer import ClipTokenizer
from .safefile import PICKLES, WeightFile, Weights, refuse_pickle

Layout = Literal["single", "folder"]

PART_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Folder name of each part to the stem of its weight file."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
DEFAULTS_FILE = "diffray.json"
"""Options that a checkpoint brings itself (`families.Options`), say the steps and guidance it wants."""
CONFIG_FILES = (
    "model_index.json",
    DEFAULTS_FILE,
    *(f"{part}/config.json" for part in PART_FILES),
    "scheduler/scheduler_config.json",
    "low_res_scheduler/scheduler_config.json",
    *(f"{folder}/{name}" for folder in TOKENIZERS.values() for name in (*TOKENIZER_FILES, "tokenizer.json")),
)
VARIANTS = ("", ".fp16", ".bf16", ".non_ema")
"""Weight file variants in order of preference: the full precision first."""
METADATA_PREFIX = "diffray."


@dataclass(frozen=True)
class Checkpoint:
    """Files of one checkpoint, opened but not read.

    Attributes:
        path: the file or the folder.
        layout: which of the two.
        weights: part name to its tensors; a single file has one entry, "".
        texts: relative path to content of the folder's configs and tokenizer files.
    """

    path: Path
    layout: Layout
    weights: dict[str, Weights]
    texts: dict[str, str]

    @property
    def metadata(self) -> dict[str, str]:
        """Header metadata of the single file (empty for a folder)."""
        return self.weights[""].files[0].metadata if self.layout == "single" else {}

    def config(self, name: str) -> dict[str, Any] | None:
        """One of the JSON configs, None when the checkpoint lacks it.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        return parse_json(self.texts[name], f"{self.path}: {name}") if name in self.texts else None

    def tokenizer(self, part: str) -> ClipTokenizer | None:
        """The checkpoint's own tokenizer of a text encoder, None when it has none."""
        folder = TOKENIZERS[part]
        if self.layout == "folder":
            return ClipTokenizer.from_folder(self.path / folder) if (self.path / folder).is_dir() else None
        vocab, merges = self.config(f"{folder}/vocab.json"), self.texts.get(f"{folder}/merges.txt")
        return (
            None if vocab is None or merges is None else ClipTokenizer.from_files(vocab, merges.split("\n"))
        )

    def pad_token(self, part: str) -> str | None:
        """The pad token that the tokenizer's files name."""
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            token = (self.config(f"{TOKENIZERS[part]}/{name}") or {}).get("pad_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                return token
        return None

    def files(self) -> list[Path]:
        """Every weight file."""
        return [file.path for weights in self.weights.values() for file in weights.files]

    def checksum(self) -> str:
        """sha256 of what the model was read from.

        A single file: of its bytes, the number that model hubs publish. A folder: of the lines
        "<relative path> <sha256>" of its weights, configs and tokenizer files, sorted.

        Raises:
            CheckpointError: a weight file changed since it was opened.
        """
        for weights in self.weights.values():
            for file in weights.files:
                file.check_unchanged()
        if self.layout == "single":
            return _sha256(self.path)
        lines = [f"{file.relative_to(self.path).as_posix()} {_sha256(file)}" for file in self.files()]
        lines += [f"{name} {hashlib.sha256(text.encode()).hexdigest()}" for name, text in self.texts.items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a local file or folder; reads headers and configs, no tensor data.

    Raises:
        CheckpointError: nothing there, incomplete, or not a checkpoint.
        UnsafeCheckpoint: it holds pickles.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    file = WeightFile(path)
    # Only these names: they become paths when the file is converted to a folder.
    carried = {name: file.metadata.get(METADATA_PREFIX + name) for name in CONFIG_FILES}
    texts = {name: text for name, text in carried.items() if text is not None}
    return Checkpoint(path, "single", {"": Weights([file])}, texts)


def _open_folder(path: Path) -> Checkpoint:
    weights = {}
    for part, stem in PART_FILES.items():
        if (path / part).is_dir():
            weights[part] = Weights(WeightFile(file) for file in part_files(path / part, stem))
    if not weights:
        inside = sorted(p.name for p in path.iterdir())[:10]
        raise CheckpointError(
            f"{path}: not a diffusers folder: got {inside}, wanted unet/, vae/, text_encoder/"
        )
    texts = {name: read_text(path / name) for name in CONFIG_FILES if (path / name).is_file()}
    return Checkpoint(path, "folder", weights, texts)


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object; anything else is a CheckpointError that says where."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: got {type(value).__name__}, allowed is an object")
    return value


def read_text(path: Path) -> str:
    """A small text file; what goes wrong is a CheckpointError with its path."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    return parse_json(read_text(path), str(path))


def part_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of one part: a whole file, else its shards, the full precision first.

    Raises:
        CheckpointError: none there, or shards are missing or outside the folder.
        UnsafeCheckpoint: only pickles are there.
    """
    for variant in VARIANTS:
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return [whole]
        for index in (f"{stem}{variant}.safetensors.index.json", f"{stem}.safetensors.index{variant}.json"):
            if (folder / index).is_file():
                return _shards(folder, folder / index)
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            refuse_pickle(file)
    raise CheckpointError(
        f"{folder}: no {stem}.safetensors here, got {sorted(p.name for p in folder.iterdir())[:10]}"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: shard {name!r} is not a file of this folder")
        if Path(name).suffix in PICKLES:
            raise UnsafeCheckpoint(f"{index}: shard {name} is a pickle; convert it with: diffray convert")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:10])}"
        )
    return [folder / name for name in sorted(names)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
