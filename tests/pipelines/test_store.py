"""The store's five verbs, locally and on an object store without renames (fsspec's memory)."""

from __future__ import annotations

import pickle
import threading
import uuid
from pathlib import Path

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "s") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_write_read_list_remove(store: Store) -> None:
    assert store.list("a") == []
    store.write("a/x", b"1")
    store.write("a/b/y", b"2")
    store.write("a/x", b"3")
    assert store.read("a/x") == b"3"
    assert store.list("a") == ["b", "x"]
    assert (store.exists("a/x"), store.exists("a/z"), store.exists("a")) == (True, False, False)
    store.remove("a/x")
    store.remove("a/x")
    assert store.list("a") == ["b"]
    with pytest.raises(FileNotFoundError):
        store.read("a/x")


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert store.read("k") == b"first"


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    store, won = Store(str(tmp_path)), []

    def attempt(i: int) -> None:
        if store.put_if_absent("k", str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(i).encode() for i in won] == [store.read("k")]


def test_nothing_is_left_over_and_it_travels(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(Store(str(tmp_path))))
    store.write("a/x", b"1")
    store.put_if_absent("a/x", b"2")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["a/x"]


def test_a_failed_write_leaves_no_part(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "a").write_bytes(b"a file where a folder should be")
    with pytest.raises(StorageError, match="EEXIST"):
        store.write("a/x", b"1")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "a"]
