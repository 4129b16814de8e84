"""`convert`: between the single-file layout and the diffusers folder, both ways, and out of pickles.

A single file that came from a folder carries the folder's small files in its header (`diffray.<path>`), so
the way there and back loses nothing. Pickles are opened in a subprocess that can build tensors only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import TextConfig, UNetConfig, VAEConfig
from ..errors import CheckpointError, UnsafeCheckpoint
from ..networks.tokenizer import ClipTokenizer
from .blueprint import Blueprint, recognise
from .checkpoint import METADATA_PREFIX, PART_FILES, TOKENIZERS, Layout, open_checkpoint
from .export import SCHEDULER, folder_texts, modelspec
from .families import Options
from .keys import Rule, clip_rules, openclip_rules, renamed, unet_modules, vae_modules
from .load import DTYPES, stored_vae
from .parts import SINGLE_PARTS, Part, pieces
from .safefile import PICKLES, looks_pickled
from .source import resolve
from .unpickle import REFUSED

LOGIT_SCALE = math.log(1 / 0.07)
"""Where CLIP training starts; Stable Diffusion never reads it, but its code expects the key."""


def convert(
    source: str,
    target: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | None = None,
    **options: Any,
) -> Path:
    """Writes a checkpoint in another layout or type, or out of pickles.

    The source is checked as strictly as for loading, and what an option decides (`prediction_type`, `ema`,
    `variant`, `vae`) is written down.

    Args:
        source: as for `load_model`; also a pickle (.ckpt, .pt, .bin), or a folder with pickled weights.
        target: a path where nothing is yet; it appears at once and whole.
        layout: "single" or "folder"; None takes "single" for a name that ends in .safetensors.
        dtype: "float32", "float16" or "bfloat16" for every weight; None keeps each as it is.
        vae: source of an autoencoder to put in place of the source's own.
        options: see `families.Options`.

    Returns:
        The target.

    Raises:
        CheckpointError: the source does not load, the target exists, or the layout cannot hold the model.
        UnsafeCheckpoint: a pickle asks for more than tensors.
    """
    goal = Path(target)
    if goal.exists():
        raise CheckpointError(f"{goal}: exists already; choose another target")
    if dtype is not None and not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise CheckpointError(f"dtype: got {dtype!r}, allowed is one of {', '.join(DTYPES)}")
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    chosen = Options.of(options)
    with _staged(resolve(source)) as path:
        blueprint = recognise(open_checkpoint(path), chosen, None if vae is None else stored_vae(vae))
        problems = blueprint.problems()
        problems.check(path)
        largest = float("inf") if wanted is None else torch.finfo(wanted).max
        tensors = {name: pieces(part, problems, largest) for name, part in blueprint.parts.items()}
        problems.check(path)
        single = layout == "single" or (layout is None and goal.suffix == ".safetensors")
        goal.parent.mkdir(parents=True, exist_ok=True)
        part = goal.with_name(f".{goal.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            (_write_single if single else _write_folder)(part, blueprint, tensors, wanted, chosen)
            part.rename(goal)
        finally:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    return goal


Pieces = Mapping[str, Mapping[str, Tensor]]


def _write_folder(
    path: Path, blueprint: Blueprint, tensors: Pieces, dtype: torch.dtype | None, options: Options
) -> None:
    for name, text in folder_texts(blueprint, options).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    for name, found in tensors.items():
        owned = {key: _owned(tensor, dtype) for key, tensor in found.items()}
        save_file(owned, path / name / f"{PART_FILES[name]}.safetensors", metadata={"format": "pt"})


def _write_single(
    path: Path, blueprint: Blueprint, tensors: Pieces, dtype: torch.dtype | None, options: Options
) -> None:
    result: dict[str, Tensor] = {}
    for name, part in blueprint.parts.items():
        found = tensors[name]
        for rule in single_rules(blueprint, part):
            result[rule.file] = _owned(rule.pack(tuple(found[key] for key in rule.folder)), dtype)
        if isinstance(part.config, TextConfig):
            prefix, style = single_place(blueprint, name)
            like = next(iter(found.values())).to(dtype or next(iter(found.values())).dtype)
            result |= unused_tensors(part.config, prefix, style, like, result)
    source = blueprint.checkpoint.metadata
    kept = {key: value for key, value in source.items() if not key.startswith(METADATA_PREFIX)}
    carried = _carried(blueprint, options)
    save_file(result, path, metadata={"format": "pt"} | kept | modelspec(blueprint.config) | carried)


def _carried(blueprint: Blueprint, options: Options) -> dict[str, str]:
    """What the header must say besides the standard keys: the small files that the source has (without the
    vocabulary that every CLIP shares), and the scheduler when an option decided about it."""
    names = set(blueprint.checkpoint.texts)
    if options.variant is not None or blueprint.config.noise.zero_terminal_snr:
        names.add(SCHEDULER)
    texts = folder_texts(blueprint, options, names)
    openai = ClipTokenizer.openai()
    common = {
        f"{TOKENIZERS[name]}/{file}"
        for name, tokenizer in blueprint.tokenizers.items()
        if tokenizer is openai or tokenizer.vocab == openai.vocab
        for file in ("vocab.json", "merges.txt", "tokenizer.json")
    }
    return {METADATA_PREFIX + name: text for name, text in texts.items() if name not in common}


# Names in a single file ------------------------------------------------------------------------------------


def single_place(blueprint: Blueprint, name: str) -> tuple[str, str]:
    """Prefix and naming style of a part in its family's single file."""
    family = blueprint.config.family
    xl = family in ("sdxl", "sdxl-refiner")
    openclip = name == "text_encoder_2" or family in ("sd2", "x4-upscaler")
    embedder = {"text_encoder": 0, "text_encoder_2": 1 if family == "sdxl" else 0}
    for part, prefix, style in SINGLE_PARTS:
        if part != name:
            continue
        here = not style or (style == "openclip") == openclip
        if here and (
            not style or prefix.startswith(f"conditioner.embedders.{embedder[name]}." if xl else "cond_")
        ):
            return prefix, style
    raise CheckpointError(f"{name} has no place in a {family} file")


def single_rules(blueprint: Blueprint, part: Part) -> list[Rule]:
    """Rules of a part under its single-file names."""
    prefix, style = single_place(blueprint, part.name)
    if isinstance(part.config, UNetConfig):
        return renamed(unet_modules(part.config), part.shapes, prefix)
    if isinstance(part.config, VAEConfig):
        return renamed(vae_modules(part.config), part.shapes, prefix)
    if style == "openclip":
        return list(openclip_rules(part.config, prefix))
    return clip_rules(part.shapes, prefix, {f"{prefix}text_model.": None})


def unused_tensors(
    config: TextConfig, prefix: str, style: str, like: Tensor, made: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors that the original code expects and no image depends on.

    SD2 runs all but the last of OpenCLIP's blocks; a folder does not have that block, so an identity (zero
    output projections) takes its place.
    """
    if style == "clip":
        return {f"{prefix}text_model.embeddings.position_ids": torch.arange(config.positions)[None]}
    result = {f"{prefix}logit_scale": like.new_tensor(LOGIT_SCALE)}
    if config.projection_dim is None:
        block = f"{prefix}transformer.resblocks."
        model = f"{block}{config.layers - 1}."
        for key in [key for key in made if key.startswith(model)]:
            result[f"{block}{config.layers}.{key.removeprefix(model)}"] = torch.zeros_like(made[key])
        for norm in ("ln_1", "ln_2"):
            result[f"{block}{config.layers}.{norm}.weight"] = torch.ones_like(made[f"{model}{norm}.weight"])
        result[f"{prefix}text_projection"] = torch.eye(config.hidden, dtype=like.dtype)
    return result


def _owned(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of its own, so that files are not kept mapped and no two tensors share memory."""
    return tensor.to(dtype or tensor.dtype, copy=True).contiguous()


# Pickles ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """The path itself, or a temporary copy with every pickle turned into safetensors."""
    bins = list(_pickled_parts(path)) if path.is_dir() else []
    pickled = path.is_file() and (path.suffix.lower() in PICKLES or looks_pickled(path))
    if not bins and not pickled:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="diffray-") as name:
        stage = Path(name) / path.name
        if pickled:
            stage = stage.with_suffix(".safetensors")
            unpickle(path, stage)
        else:
            shutil.copytree(path, stage, ignore=_only_small, symlinks=False)
            for part, files in bins:
                _stage_part(stage / part, PART_FILES[part], files)
            for part in set(PART_FILES) - {part for part, _ in bins}:
                for file in (path / part).glob("*.safetensors"):
                    (stage / part / file.name).symlink_to(file.resolve())
        yield stage


def _only_small(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if (Path(folder) / n).is_file() and not n.endswith((".json", ".txt"))]


def _pickled_parts(path: Path) -> Iterator[tuple[str, list[Path]]]:
    """Parts of a folder whose only weights are pickles, with the files of one variant."""
    for part, stem in PART_FILES.items():
        stem = f"pytorch_{stem}" if part.startswith("text") else stem
        if not (path / part).is_dir() or any((path / part).glob("*.safetensors")):
            continue
        for variant in ("", ".fp16"):
            if files := sorted((path / part).glob(f"{stem}{variant}.bin")):
                yield part, files
                break
            if files := sorted((path / part).glob(f"{stem}-*-of-*{variant}.bin")):
                yield part, files
                break


def _stage_part(folder: Path, stem: str, files: Iterable[Path]) -> None:
    names = {}
    for n, file in enumerate(files):
        names[str(n)] = f"{stem}-{n}.safetensors"
        unpickle(file, folder / names[str(n)])
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"weight_map": names}), encoding="utf-8"
    )


def unpickle(source: Path, target: Path) -> None:
    """The tensors of a pickle, as a safetensors file; runs in a process of its own.

    Raises:
        UnsafeCheckpoint: the pickle asks for anything but tensors; nothing of it was run.
        CheckpointError: it cannot be read.
    """
    script = Path(__file__).with_name("unpickle.py")
    command = [sys.executable, "-I", str(script), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == REFUSED:
        raise UnsafeCheckpoint(f"{source}: refused, it holds more than tensors: {reason}")
    raise CheckpointError(f"{source}: cannot be read as a pickle of tensors: {reason}")
