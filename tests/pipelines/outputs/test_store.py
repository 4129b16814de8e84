"""The store's verbs: locally, on an object store without renames (fsspec's memory), and on S3 with faults."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffray.model import storage
from diffray.model.errors import StorageError
from diffray.pipelines import Store

from ..s3 import S3, Fault, FaultyProxy, broken

IMPATIENT = {"config_kwargs": {"read_timeout": 2.0}}


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "s"))
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    s3: S3 = request.getfixturevalue("s3")
    return Store(s3.folder(), s3.options())


@pytest.fixture
def faulty(s3: S3) -> Iterator[tuple[FaultyProxy, Store, Store]]:
    """A proxy, the store behind it, and the same store without it."""
    with broken(s3) as (proxy, through):
        url = s3.folder()
        yield proxy, Store(url, through.options(**IMPATIENT)), Store(url, s3.options())


def test_write_read_list_remove(store: Store) -> None:
    assert store.list("a") == []
    store.write("a/x", b"1")
    store.write("a/b/y", b"2")
    store.write("a/x", b"3")
    assert store.read("a/x") == b"3"
    assert store.list("a") == ["b", "x"]
    ages = store.ages("a")
    assert ages.keys() == {"b", "x"}
    assert ages["b"] is None
    assert ages["x"] is not None
    assert 0 <= ages["x"] < 60
    assert (store.exists("a/x"), store.exists("a/z"), store.exists("a")) == (True, False, False)
    store.remove("a/x")
    store.remove("a/x")
    assert store.list("a") == ["b"]
    with pytest.raises(FileNotFoundError):
        store.read("a/x")


def test_records_are_in_the_order_of_their_numbers(store: Store) -> None:
    for name in (
        "99999.json",
        "100000.json",
        "00001.json",
        "123456.json",
        "7.json",
        "notes.json",
        "00002.txt",
    ):
        store.write(f"a/{name}", b"{}")
    assert store.numbered("a") == [1, 99_999, 100_000, 123_456]
    assert store.numbered("b") == []


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert store.put_if_absent("k", b"first"), "a repeated request must not look like somebody else's"
    assert store.read("k") == b"first"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_at_once_one_wins(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if where == "s3":
        s3: S3 = request.getfixturevalue("s3")
        store = Store(s3.folder(), s3.options())
    else:
        store = Store(str(tmp_path))
    won = []

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


def test_options_travel_and_stay_unseen(s3: S3) -> None:
    store = Store(s3.folder(), s3.options())
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"
    assert s3.secret not in repr(store)


# A full or broken disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["write", "put_if_absent"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE])
def test_a_failing_disk_is_named_and_leaves_no_part(
    tmp_path: Path, verb: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError) as failure:
        getattr(store, verb)("a/x", b"1")
    assert str(failure.value) == f"{tmp_path}/a/x: {errno.errorcode[code]}: {os.strerror(code)}"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    store = Store(str(tiny_disk))
    store.write("a", bytes(20_000))
    with pytest.raises(StorageError, match=r"/b: ENOSPC: No space left on device"):
        store.write("b", bytes(200_000))
    assert [p.name for p in tiny_disk.rglob("*") if p.is_file()] == ["a"]
    store.write("c", bytes(20_000))


def test_a_name_in_the_way(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "a").write_bytes(b"a file where a folder should be")
    with pytest.raises(StorageError, match="EEXIST"):
        store.write("a/x", b"1")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "a"]


# Faults between client and server -------------------------------------------------------------------------


def nth(which: Callable[[int], bool], fault: Fault, method: str = "PUT") -> Callable[[int, str, str], Fault]:
    """`fault` for those requests of a method whose number among their kind is one of `which`."""
    seen = [0]

    def decide(number: int, actual: str, path: str) -> Fault:
        if actual != method:
            return None
        seen[0] += 1
        return fault if which(seen[0]) else None

    return decide


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "409", "reset", "lost", 4.0])
@pytest.mark.parametrize("verb", ["write", "put_if_absent"])
def test_a_write_survives(faulty: tuple[FaultyProxy, Store, Store], verb: str, fault: Fault) -> None:
    """`lost` and the delay beyond the client's patience are writes that landed without the client knowing."""
    if fault == "409" and verb == "write":
        pytest.skip("only conditional writes conflict")
    proxy, store, direct = faulty
    proxy.fault = nth(lambda n: n == 1, fault)
    assert getattr(store, verb)("k", b"mine") in (True, None)
    assert direct.read("k") == b"mine"
    assert proxy.faults() == 1
    if verb == "put_if_absent":
        assert not store.put_if_absent("k", b"yours")
        assert direct.read("k") == b"mine"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "reset", "truncated", 4.0])
def test_a_read_and_a_listing_survive(faulty: tuple[FaultyProxy, Store, Store], fault: Fault) -> None:
    proxy, store, direct = faulty
    direct.write("a/k", bytes(range(256)) * 40)
    proxy.fault = nth(lambda n: n == 1, fault, "GET")
    assert store.read("a/k") == bytes(range(256)) * 40
    if fault != "truncated":
        proxy.fault = nth(lambda n: n == 1, fault, "GET")
        assert store.list("a") == ["k"]
        assert proxy.faults() == 2


@pytest.fixture
def few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    monkeypatch.setattr(storage, "READS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("few_attempts")
def test_a_write_whose_every_answer_is_lost_counts_if_it_landed(
    faulty: tuple[FaultyProxy, Store, Store],
) -> None:
    proxy, store, direct = faulty
    proxy.fault = nth(lambda n: True, "lost")
    store.write("a", b"1")
    assert store.put_if_absent("b", b"2")
    assert (direct.read("a"), direct.read("b")) == (b"1", b"2")


@pytest.mark.usefixtures("few_attempts")
def test_a_storage_that_stays_away_is_given_up_in_bounded_time(
    faulty: tuple[FaultyProxy, Store, Store],
) -> None:
    proxy, store, _ = faulty
    proxy.fault = nth(lambda n: True, "503")
    with pytest.raises(StorageError, match=r"/k: (SlowDown|503)"):
        store.write("k", b"1")
    assert proxy.faults() == 3


def test_expired_credentials_are_told_at_once(faulty: tuple[FaultyProxy, Store, Store], s3: S3) -> None:
    proxy, store, _ = faulty
    proxy.fault = lambda number, method, path: "expired"
    for call in (
        lambda: store.write("k", b"1"),
        lambda: store.put_if_absent("k", b"1"),
        lambda: store.read("k"),
    ):
        with pytest.raises(StorageError, match=r"/k: ExpiredToken") as failure:
            call()
        assert s3.secret not in str(failure.value)
    assert proxy.faults() == 3


def test_a_storage_without_conditional_puts_refuses(faulty: tuple[FaultyProxy, Store, Store]) -> None:
    proxy, store, _ = faulty
    proxy.fault = nth(lambda n: True, "501")
    with pytest.raises(StorageError, match="cannot create an object only if it is absent"):
        store.put_if_absent("k", b"1")


def test_a_bucket_that_is_not_there_is_told(s3: S3) -> None:
    store = Store("s3://no-such-bucket-of-diffray/x", s3.options())
    with pytest.raises(StorageError, match="NoSuchBucket"):
        store.write("k", b"1")
    with pytest.raises(StorageError, match="NoSuchBucket"):
        store.read("k")


def test_wrong_credentials_are_told(s3: S3) -> None:
    if not s3.real:
        pytest.skip("moto takes any")
    store = Store(s3.folder(), {**s3.options(), "secret": "wrong"})
    with pytest.raises(StorageError, match=r"SignatureDoesNotMatch|AccessDenied|Forbidden|403"):
        store.write("k", b"1")


@pytest.mark.slow
def test_ten_thousand_objects_are_listed(s3: S3) -> None:
    store = Store(s3.folder(), s3.options())
    names = [f"{i:05d}.json" for i in range(10_000)]
    s3.fill(store.path("many"), names)
    assert store.list("many") == names


def test_unfinished_uploads_are_aborted_by_age_and_folder(s3: S3) -> None:
    store, other = (Store(s3.folder(), s3.options()) for _ in range(2))
    files: Any = s3.filesystem()
    for one in (store, other):
        bucket, _, key = one.path("big").partition("/")
        files.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    if s3.real:  # moto says that all uploads began in 2010
        assert store.abort_uploads(3600) == 0
    assert store.abort_uploads(0) == 1
    assert store.abort_uploads(0) == 0
    assert other.abort_uploads(0) == 1


def test_all_pages_of_unfinished_uploads_are_aborted(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 lists a thousand at a time; moto lists all at once, so they are cut into pages here."""
    store, files = Store(s3.folder(), s3.options()), s3.filesystem()
    bucket, _, root = store.path("").partition("/")
    for name in ("a", "b", "b", "b", "c"):
        files.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{root}{name}")
    call, pages = store._fs.call_s3, []

    def paged(verb: str, **query: Any) -> Any:
        after = query.pop("KeyMarker", ""), query.pop("UploadIdMarker", "")
        found = sorted(call(verb, **query)["Uploads"], key=lambda one: (one["Key"], one["UploadId"]))
        rest = [one for one in found if (one["Key"], one["UploadId"]) > after]
        page, more = rest[:2], len(rest) > 2
        pages.append(len(page))
        last = {"NextKeyMarker": page[-1]["Key"], "NextUploadIdMarker": page[-1]["UploadId"]} if more else {}
        return {"Uploads": page, "IsTruncated": more, **last}

    monkeypatch.setattr(store._fs, "call_s3", paged)
    assert store.abort_uploads(0) == 5
    assert pages == [2, 2, 1]
    assert not call("list_multipart_uploads", Bucket=bucket, Prefix=root).get("Uploads")


# Opening ---------------------------------------------------------------------------------------------------


def test_a_url_with_credentials_is_refused_without_showing_them() -> None:
    with pytest.raises(StorageError, match="storage options") as refusal:
        Store("s3://AKIAKEY:sesame@bucket/x")
    assert "sesame" not in str(refusal.value)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageError, match="nosuch"):
        Store("nosuch://bucket/x")
