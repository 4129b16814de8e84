"""Where a model comes from: a name, a path, a URL or a hub id, turned into a local path.

Remote files are fetched once per machine into a cache: under a temporary name, checked for size and sha256,
then renamed, under a lock that dies with its process. A hub id goes through huggingface_hub's own cache,
which is asked first, so that a machine without a network works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from ..storage import open_storage
from .checkpoint import CONFIG_FILES, PART_FILES

EMBEDDED = "embedded"
CACHE_VARIABLE = "DIFFRAY_CACHE"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(/(?P<file>[^@]+\.safetensors))?(@(?P<revision>[\w./-]+))?")
CHUNK = 16 * 2**20
FOLDER_FILES = (*CONFIG_FILES, *(f"{part}/{stem}*" for part, stem in PART_FILES.items()))
UNWANTED = (
    ".bin",
    ".bin.index.json",
    ".ckpt",
    ".pt",
    ".pth",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".part",
)


def resolve(source: str | os.PathLike[str], storage: Mapping[str, Any] | None = None) -> Path:
    """The local path of a source, after fetching it if need be.

    Args:
        source: "embedded" (the model in this package), a path, an fsspec URL of a file or diffusers folder
            ("s3://bucket/model.safetensors", optionally "#sha256=<hex>" for a file), or a hub id
            ("org/name", "org/name@revision", "org/name/file.safetensors").
        storage: fsspec options for a URL (`endpoint_url`, `profile`, `anon`, ...).

    Raises:
        CheckpointError: it does not exist or cannot be fetched; names the paths that were tried.
    """
    text = os.fspath(source)
    if text == EMBEDDED:
        return embedded()
    if "://" in text:
        return fetch(text, storage)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if match := HUB_ID.fullmatch(text):
        return hub(match["repo"], match["file"], match["revision"], path)
    raise CheckpointError(f"{text}: no such file or folder (looked in {path.absolute()})")


def embedded() -> Path:
    """The folder of the model that this package ships.

    Raises:
        CheckpointError: this installation has none.
    """
    path = Path(str(resources.files("diffray.model").joinpath(EMBEDDED)))
    if not (path / "model_index.json").is_file():
        raise CheckpointError(f"{path}: this installation has no embedded model; give a source")
    return path


def cache_folder() -> Path:
    """Where fetched files live: $DIFFRAY_CACHE, else ~/.cache/diffray."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "diffray")


# Hub -------------------------------------------------------------------------------------------------------


def hub(repo: str, file: str | None, revision: str | None, tried: Path) -> Path:
    """A hub repository (its diffusers folder) or one file of it, from the local cache if it is whole there.

    A name without a revision therefore stays at what was fetched first; name a revision to move on.

    Raises:
        CheckpointError: not in the cache and not to be had; names where it looked.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    def get(local: bool) -> Path:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=local))
        patterns = [*FOLDER_FILES]
        ignore = [f"*{ending}" for ending in UNWANTED]
        found = snapshot_download(
            repo, revision=revision, local_files_only=local, allow_patterns=patterns, ignore_patterns=ignore
        )
        return Path(found)

    with contextlib.suppress(Exception):
        path = get(local=True)
        if path.is_file() or _whole(path):
            return path
    try:
        path = get(local=False)
        if path.is_file() or _whole(path):
            return path
        raise CheckpointError(f"{path} lacks model_index.json or safetensors weights that it names")
    except Exception as error:  # the hub client raises from four libraries
        cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{repo}: no such path ({tried.absolute()}), not complete in the hub cache ({cache}), "
            f"and not fetched: {type(error).__name__}: {reason}"
        ) from error


def _whole(folder: Path) -> bool:
    """Whether a snapshot has weights for every part that its index names."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    parts = [part for part in PART_FILES if isinstance(index.get(part), list) and index[part][0] is not None]
    return bool(parts) and all(any((folder / part).glob("*.safetensors")) for part in parts)


# URLs ------------------------------------------------------------------------------------------------------


def fetch(url: str, storage: Mapping[str, Any] | None = None) -> Path:
    """A remote file or folder, in the cache; a `file://` URL is its own path.

    Raises:
        CheckpointError: nothing there, a wrong size or sha256, or the disk is full.
    """
    address, _, fragment = url.partition("#")
    expected = _expected(url, fragment)
    try:
        fs, root = open_storage(address, storage)
    except (ImportError, ValueError, OSError) as error:
        raise CheckpointError(f"{url}: {error}") from error
    if address.startswith(("file://", "local://")):
        path = Path(root)
        if not path.exists():
            raise CheckpointError(f"{url}: no such file or folder (looked in {path})")
        return path
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    target = cache_folder() / f"{digest}-{PurePosixPath(root).name or 'root'}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")):
            if fs.isfile(root):
                _fetch_file(fs, root, target, expected)
            else:
                _fetch_folder(fs, root, target, url)
    except CheckpointError:
        raise
    except Exception as error:  # every storage client has its own exceptions
        if target.exists() and _complete(target):
            return target  # the storage is down, but all of it was fetched before
        raise CheckpointError(
            f"{url}: cannot be fetched into {target}: {type(error).__name__}: {error}"
        ) from error
    return target


def _expected(url: str, fragment: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
    if match is None:
        raise CheckpointError(f"{url}: the part after # must be sha256= and 64 hex digits")
    return match[1]


def _fetch_folder(fs: Any, root: str, target: Path, url: str) -> None:
    names = [PurePosixPath(name).relative_to(root).as_posix() for name in fs.find(root)]
    wanted = [name for name in names if _wanted(name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointError(
            f"{url}: no file and no diffusers folder with safetensors there, got {names[:10]}"
        )
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _fetch_file(fs, f"{root.rstrip('/')}/{name}", target / name, None)
    (target / ".complete").touch()


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if name.endswith(UNWANTED) or ".." in path.parts or path.is_absolute():
        return False
    return any(path.match(pattern) for pattern in FOLDER_FILES)


def _complete(target: Path) -> bool:
    return target.is_file() or (target / ".complete").exists()


def _fetch_file(fs: Any, name: str, target: Path, expected: str | None) -> None:
    """One file, unless it is there with the remote's size and version."""
    info = fs.info(name)
    size, version = info.get("size"), str(info.get("ETag") or info.get("mtime") or info.get("created") or "")
    record = target.with_name(target.name + ".fetched.json")
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
        same = target.stat().st_size == known["size"] == size and known["version"] == version
        if same and expected in (None, known["sha256"]):
            return
    part = target.with_name(f"{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        digest = _copy(fs, name, part)
        got = part.stat().st_size
        if size is not None and got != size:
            raise CheckpointError(f"{name}: got {got} bytes, the storage says {size}")
        if expected not in (None, digest):
            raise CheckpointError(f"{name}: sha256 is {digest}, expected was {expected}")
        part.replace(target)
        record.write_text(json.dumps({"size": got, "version": version, "sha256": digest}), encoding="utf-8")
    finally:
        part.unlink(missing_ok=True)


def _copy(fs: Any, name: str, part: Path) -> str:
    digest = hashlib.sha256()
    with fs.open(name, "rb") as source, part.open("wb") as sink:
        while block := source.read(CHUNK):
            digest.update(block)
            sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when the process dies."""
    import fcntl  # POSIX only, like the rest of a Ray cluster

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
