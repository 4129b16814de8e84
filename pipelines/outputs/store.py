"""All reading and writing of one job's output directory, local or object storage.

A few verbs are enough for the whole protocol, and each is atomic: a reader sees the old object, the new one
or none, never a part. Nothing is ever renamed into place on an object store.

Transient faults of the storage are retried with bounded backoff by its client (`diffray.model.storage`). What
is left is a `StorageError` that names the object; the job stops and can be resumed. A write whose answer got
lost may have landed: then the object is read back, and it counts if it holds what was to be written.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from posixpath import basename, join
from typing import Any

from diffray.model.errors import StorageError
from diffray.model.storage import open_storage

SCRATCH = "_diffray/tmp"
RACES = 8
"""Tries of a conditional put that the store answers with "another one is under way"."""


class Store:
    """The objects below one root, named by relative paths with forward slashes.

    Picklable, options included, so that workers on other nodes write to the same place.

    Raises:
        StorageError: the URL cannot be opened, or by any method: the storage failed.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self._options = dict(options or {})
        try:
            self._fs, self._root = open_storage(url, self._options)
        except (ValueError, ImportError, OSError, TypeError) as error:
            raise StorageError(f"output: {_why(error)}") from None
        self._protocols = _protocols(self._fs)
        self.local = "file" in self._protocols

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        # A relative path means something else where the worker runs.
        return type(self), (self._root if self.local else self.url, self._options)

    def path(self, name: str) -> str:
        """The full path of an object, for messages and for readers of the result."""
        return join(self._root, name)

    def read(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError when there is none."""
        # s3fs asks for the size first unless told that one request is enough.
        single = {"max_concurrency": 1} if "s3" in self._protocols else {}
        with self._told(name, missing_is_fault=False):
            return bytes(self._fs.cat_file(self.path(name), **single))

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._told(name):
            try:
                return bool(self._fs.info(self.path(name))["type"] == "file")
            except (FileNotFoundError, NotADirectoryError):
                return False

    def list(self, folder: str = "") -> list[str]:
        """Names (without the folder) of the objects and folders directly below `folder`, sorted."""
        return sorted(_name(entry) for entry in self._entries(folder, detail=False))

    def numbered(self, folder: str) -> Sequence[int]:
        """The numbers of the records `00001.json` and on directly below `folder`, ascending.

        From 100000 on that is not the order of their names.
        """
        names = (re.fullmatch(r"(\d{5,})\.json", name) for name in self.list(folder))
        return sorted(int(name[1]) for name in names if name)

    def ages(self, folder: str = "") -> dict[str, float | None]:
        """Names directly below `folder`, each with the seconds since it was written; None for folders."""
        return {_name(entry["name"]): _age(entry) for entry in self._entries(folder, detail=True)}

    def _entries(self, folder: str, *, detail: bool) -> Sequence[Any]:
        path = self.path(folder).rstrip("/")
        with self._told(folder or "the output"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(path, detail=detail)
            except (FileNotFoundError, NotADirectoryError):
                return ()
        # An object store may hold a marker object for the folder itself.
        return [e for e in entries if _name(e["name"] if detail else e) not in ("", basename(path))]

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        with self._told(name):
            if self.local:
                with self._scratch(data) as scratch:
                    os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
                    os.replace(scratch, self.path(name))
                return
            try:
                self._fs.pipe_file(self.path(name), data)
            except Exception as error:
                if _refused(error) or not self._holds(name, data):
                    raise

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object; False, and nothing changed, when there is another one already.

        Of any number of processes that try at once with data of their own, exactly one gets True. One that
        finds the very bytes it wanted to write gets True as well, because a request that was repeated after
        its answer got lost looks like that. Locally this is a hard link; object stores get a conditional put
        (`If-None-Match: *`), and one that has none refuses loudly.
        """
        with self._told(name):
            created = self._link(name, data) if self.local else self._put_new(name, data)
            return created or self._holds(name, data)

    def remove(self, name: str) -> None:
        """Delete one object that this job wrote; quiet when there is none."""
        with self._told(name), suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def abort_uploads(self, age: float) -> int:
        """Abort this root's multipart uploads that were begun `age` seconds ago and never finished; returns how many.

        Only S3 knows such things; they are invisible, and paid for.
        """
        if "s3" not in self._protocols:
            return 0
        bucket, _, prefix = self._root.partition("/")
        with self._told("unfinished uploads"):
            found, after = [], dict[str, str]()
            while True:
                page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **after)
                found += page.get("Uploads", [])
                if not page.get("IsTruncated"):
                    break
                after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
            old = [one for one in found if (_age(one, "Initiated") or 0) >= age]
            for one in old:
                self._fs.abort_mpu(bucket, one["Key"], one["UploadId"])
        return len(old)

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def _link(self, name: str, data: bytes) -> bool:
        with self._scratch(data) as scratch:
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            try:
                os.link(scratch, self.path(name))
            except FileExistsError:
                return False
        return True

    def _put_new(self, name: str, data: bytes) -> bool:
        # A chunk as large as the data keeps it one request: on some stores multipart uploads overwrite.
        single = {"chunksize": max(1, len(data))} if "s3" in self._protocols else {}
        for race in range(RACES):
            try:
                self._fs.pipe_file(self.path(name), data, mode="create", **single)
                return True
            except Exception as error:
                status = _status(error)
                if isinstance(error, FileExistsError) or status == 412:
                    return False
                if status == 409 and race < RACES - 1:
                    time.sleep(random.uniform(0, 0.1 * 2**race))
                    continue
                if status == 501 or isinstance(error, (NotImplementedError, TypeError, ValueError)):
                    raise StorageError(
                        f"{self.url}: this storage cannot create an object only if it is absent, "
                        f"which a job needs ({_why(error)})"
                    ) from error
                if _refused(error) or not self._holds(name, data):
                    raise
                return True
        raise AssertionError("unreachable")

    @contextmanager
    def _scratch(self, data: bytes) -> Iterator[str]:
        """A complete, synced file on the same file system, under a name that no reader looks at."""
        folder = self.path(SCRATCH)
        os.makedirs(folder, exist_ok=True)
        name = join(folder, uuid.uuid4().hex)
        try:
            with open(name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield name
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    @contextmanager
    def _told(self, name: str, *, missing_is_fault: bool = True) -> Iterator[None]:
        """Foreign errors become a StorageError that says which object and why."""
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if not missing_is_fault and (self.local or "bucket" not in _why(error).lower()):
                raise
            raise StorageError(f"{self.path(name)}: {_why(error)}") from error
        except Exception as error:  # every storage client has its own exceptions
            raise StorageError(f"{self.path(name)}: {_why(error)}") from error


def _name(path: str) -> str:
    return basename(path.rstrip("/"))


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _age(entry: Mapping[str, Any], *names: str) -> float | None:
    """Seconds since an entry of a listing was written, as far as its storage says."""
    for name in names or ("LastModified", "mtime", "created", "updated", "last_modified"):
        value = entry.get(name)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)) and entry.get("type") != "directory":
            return max(0.0, time.time() - value)
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of an S3 client."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    return None


def _refused(error: Exception) -> bool:
    """Whether the storage has answered that it did not do it, so that there is nothing to read back."""
    status = _status(error)
    return isinstance(error, PermissionError) or (status is not None and 400 <= status < 500)


def _why(error: BaseException) -> str:
    """An error's kind and text, with its errno's name, on one line."""
    code = getattr(error, "errno", None)
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, Mapping):
        kind = str(response.get("Error", {}).get("Code") or type(error).__name__)
    elif isinstance(code, int):
        kind = errno.errorcode.get(code, type(error).__name__)
    else:
        kind = type(error).__name__
    text = getattr(error, "strerror", None) or str(error)
    return f"{kind}: {' '.join(str(text).split())}"[:500]
