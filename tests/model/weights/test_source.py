"""Sources: paths, URLs through the cache, hub ids without a network."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pytest

from diffray.model.errors import CheckpointError
from diffray.model.weights import source as module
from diffray.model.weights.load import load_model
from diffray.model.weights.source import cache_folder, resolve

from ..checkpoints import write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    for path in list(fs.store):
        fs.store.pop(path)


def upload(fs: fsspec.AbstractFileSystem, folder: Path, root: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{root}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"x")
    assert resolve(file) == file
    assert resolve(file.as_uri()) == file
    with pytest.raises(CheckpointError, match=str(tmp_path / "y")):
        resolve(str(tmp_path / "y"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve((tmp_path / "y").as_uri())


def test_a_url_is_fetched_once(
    memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 100
    memory.pipe_file("/bucket/m.safetensors", content)
    path = resolve("memory://bucket/m.safetensors")
    assert path.read_bytes() == content
    assert path.parent == cache
    monkeypatch.setattr(module, "_copy", lambda *a: pytest.fail("fetched again"))
    assert resolve("memory://bucket/m.safetensors") == path


def test_a_changed_file_is_fetched_again(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/bucket/m.safetensors", b"old")
    assert resolve("memory://bucket/m.safetensors").read_bytes() == b"old"
    memory.pipe_file("/bucket/m.safetensors", b"new!")
    assert resolve("memory://bucket/m.safetensors").read_bytes() == b"new!"


def test_a_damaged_cache_is_repaired(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/bucket/m.safetensors", b"content")
    path = resolve("memory://bucket/m.safetensors")
    path.write_bytes(b"cont")
    assert resolve("memory://bucket/m.safetensors").read_bytes() == b"content"


def test_sha256(memory: fsspec.AbstractFileSystem, cache: Path) -> None:
    memory.pipe_file("/bucket/m.safetensors", b"content")
    good = hashlib.sha256(b"content").hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 is {good}, expected was {'0' * 64}"):
        resolve(f"memory://bucket/m.safetensors#sha256={'0' * 64}")
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]  # nothing half is left
    assert resolve(f"memory://bucket/m.safetensors#sha256={good}").read_bytes() == b"content"
    with pytest.raises(CheckpointError, match="64 hex digits"):
        resolve("memory://bucket/m.safetensors#sha1=1")


def test_a_short_read_leaves_nothing(
    memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/m.safetensors", b"content")

    def short(fs: object, name: str, part: Path) -> str:
        part.write_bytes(b"con")
        return "x"

    monkeypatch.setattr(module, "_copy", short)
    with pytest.raises(CheckpointError, match="got 3 bytes, the storage says 7"):
        resolve("memory://bucket/m.safetensors")
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_full_disk_leaves_nothing(
    memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/m.safetensors", b"content")

    def full(fs: object, name: str, part: Path) -> str:
        part.write_bytes(b"con")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(CheckpointError, match="No space left"):
        resolve("memory://bucket/m.safetensors")
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_folder_url(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"big")
    upload(memory, folder, "/models/tiny")
    model = load_model("memory://models/tiny")
    assert model.config == load_model(str(folder)).config
    local = resolve("memory://models/tiny")
    assert not (local / "safety_checker").exists()
    assert not list(local.rglob("*.bin"))


def test_a_fetched_folder_outlives_its_storage(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, write_folder(tmp_path / "folder", "sd1"), "/models/tiny")
    path = resolve("memory://models/tiny")

    def down(*args: object, **kwargs: object) -> None:
        raise ConnectionError("storage is down")

    monkeypatch.setattr(type(memory), "find", down)
    assert resolve("memory://models/tiny") == path
    with pytest.raises(CheckpointError, match="storage is down"):
        resolve("memory://models/other")


@pytest.mark.parametrize("url", ["memory://nothing/here", "nosuchscheme://x/y"])
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(CheckpointError, match=url):
        resolve(url)


def _resolve_slowly(url: str, started: str, queue: multiprocessing.Queue[str]) -> None:
    import time

    original = module._copy

    def slow(fs: object, name: str, part: Path) -> str:
        with open(started, "a") as file:
            file.write("fetch\n")
        time.sleep(0.5)
        return original(fs, name, part)

    module._copy = slow  # type: ignore[assignment]
    queue.put(str(resolve(url)))


def test_two_processes_fetch_once(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/bucket/shared.safetensors", b"content")  # forked children see it
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    queue = context.Queue()
    workers = [
        context.Process(target=_resolve_slowly, args=("memory://bucket/shared.safetensors", str(log), queue))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1
    assert log.read_text().count("fetch") == 1


# Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root


def snapshot(hub: Path, repo: str, folder: Path, commit: str = "a" * 40, ref: str = "main") -> Path:
    """Lays a folder out as huggingface_hub's cache does: blobs, links to them, and a ref."""
    home = hub / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    (home / "blobs").mkdir(exist_ok=True)
    target = home / "snapshots" / commit
    for file in (f for f in folder.rglob("*") if f.is_file()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = target / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return target


def test_a_hub_id_from_the_local_cache(hub: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    target = snapshot(hub, "org/tiny-model", folder)
    assert resolve("org/tiny-model") == target
    assert resolve("org/tiny-model@main") == target
    assert load_model("org/tiny-model").config.family == "sd1"


def test_one_file_of_a_hub_repository(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "v1.safetensors").write_bytes(b"content")
    target = snapshot(hub, "org/files", tmp_path / "repo")
    assert resolve("org/files/v1.safetensors") == target / "v1.safetensors"


def test_a_hub_id_that_is_not_there_names_where_it_looked(hub: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("org/absent")
    assert str(hub / "models--org--absent") in str(caught.value)
    assert str(Path("org/absent").absolute()) in str(caught.value)


def test_an_incomplete_snapshot_is_not_used(hub: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "sd1")
    target = snapshot(hub, "org/half", folder)
    shutil.rmtree(target / "unet")
    with pytest.raises(CheckpointError, match="not complete in the hub cache"):
        resolve("org/half")


def test_a_folder_beats_a_hub_id_of_the_same_name(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFRAY_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "diffray"
