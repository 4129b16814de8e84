"""CLIP image towers, for models that judge pictures: how their folders are read and pictures are prepared.

A folder has `config.json`, `model.safetensors` (or shards) and, for a whole CLIP model, a tokenizer. Loading is
strict, as for every checkpoint: each tensor is used or on the ignore list, each parameter is filled and finite.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.checkpoint import part_files, read_json
from ..weights.safefile import WeightFile, Weights
from ..weights.source import HUB_ID, fetch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's pixel statistics."""
FILES = ("*.json", "*.safetensors", "*.txt")


@dataclass(frozen=True, slots=True)
class JudgeFolder:
    """A judging model on disk.

    Raises:
        CheckpointError: no such folder, or no config and safetensors weights in it.
    """

    path: Path
    config: Mapping[str, Any]
    weights: Weights

    @classmethod
    def open(cls, source: str | os.PathLike[str], subfolder: str = "") -> JudgeFolder:
        """The folder of a source: a path, a URL or a hub id; `subfolder` is looked into first, if there."""
        path = _resolved(os.fspath(source))
        if subfolder and (path / subfolder).is_dir():
            path = path / subfolder
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: got a file, allowed is a folder with config.json and model.safetensors"
            )
        files = [WeightFile(file) for file in part_files(path, "model")]
        return cls(path, read_json(path / "config.json"), Weights(files))

    def checksum(self) -> str:
        """SHA-256 over names and contents of weights, configs and tokenizer files."""
        digest = hashlib.sha256()
        weights = {file.path for file in self.weights.files}
        for file in sorted({*weights, *self.path.glob("*.json"), *self.path.glob("*.txt")}):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def fill(self, module: nn.Module, rename: Callable[[str], str | None]) -> None:
        """Copy every tensor into `module`; `rename` gives its name there, or None to leave it out.

        Raises:
            CheckpointError: listing what is missing, unexpected, of another shape or not finite.
        """
        found = {name: key for key in self.weights.entries if (name := rename(key)) is not None}
        wanted = dict(module.state_dict(keep_vars=True))
        odd = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
        odd += [f"unexpected {found[name]}" for name in sorted(found.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & found.keys()):
            tensor = self.weights.read(found[name])
            if tensor.shape != wanted[name].shape:
                odd.append(f"{found[name]} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
            elif not bool(tensor.isfinite().all()):
                odd.append(f"{found[name]} has values that are not finite")
            else:
                with torch.no_grad():
                    wanted[name].copy_(tensor)
        self.weights.close()
        if odd:
            more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
            raise CheckpointError(f"{self.weights.name}: {'; '.join(odd[:10])}{more}")


def clip_pixels(image: Image.Image, side: int) -> Tensor:
    """[1, 3, side, side] as CLIP was trained: shorter side resized (bicubic), centre cut out, normalised."""
    picture = image.convert("RGB")
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    longer = int(side * long / short)
    size = (side, longer) if width <= height else (longer, side)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    levels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    normal = (levels - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)[None]


def judge_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def weights_checksum(source: str) -> str:
    """The checksum of a judging model (CLIP, safety checker) by its source."""
    return JudgeFolder.open(source, "safety_checker").checksum()


def _resolved(source: str) -> Path:
    if "://" in source:
        return fetch(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    match = HUB_ID.fullmatch(source)
    if match is None or match["file"]:
        raise CheckpointError(f"{source}: no such folder (looked in {path.absolute()})")
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": match["revision"], "allow_patterns": list(FILES)}
    with contextlib.suppress(Exception):
        return Path(snapshot_download(match["repo"], local_files_only=True, **options))
    try:
        return Path(snapshot_download(match["repo"], **options))
    except Exception as error:  # the hub client raises from four libraries
        raise CheckpointError(
            f"{source}: no such folder ({path.absolute()}), and not fetched: {error}"
        ) from error
