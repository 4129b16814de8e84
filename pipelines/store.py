"""All reading and writing of one job's output directory, local or object storage.

Five verbs are enough for the whole protocol, and each is atomic: a reader sees the old object, the new one
or none, never a part. Nothing is ever renamed into place on an object store.
"""

from __future__ import annotations

import os
import uuid
from posixpath import basename, join
from typing import Any

import fsspec

SCRATCH = "_diffray/tmp"


class Store:
    """The objects below one root, named by relative paths with forward slashes.

    Picklable, so that workers on other nodes write to the same place.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = _open(url)
        self._local = "file" in _protocols(self._fs)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        # A relative path means something else where the worker runs.
        return type(self), (self._root if self._local else self.url,)

    def path(self, name: str) -> str:
        """The full path of an object, for messages and for readers of the result."""
        return join(self._root, name)

    def read(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError when there is none."""
        return bytes(self._fs.cat_file(self.path(name)))

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        return bool(self._fs.isfile(self.path(name)))

    def list(self, folder: str = "") -> list[str]:
        """Names (without the folder) of the objects and folders directly below `folder`, sorted."""
        path = self.path(folder).rstrip("/")
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({basename(str(entry).rstrip("/")) for entry in entries} - {"", basename(path)})

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        if not self._local:
            self._fs.pipe_file(self.path(name), data)
            return
        scratch = self._scratch(data)
        try:
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            os.replace(scratch, self.path(name))
        except BaseException:
            os.unlink(scratch)
            raise

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object; False, and nothing changed, when there is one already.

        Of any number of processes that try at once exactly one gets True. Locally this is a hard link;
        object stores get a conditional put (`If-None-Match: *`), and one that has none refuses loudly.
        """
        if not self._local:
            try:
                self._fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        scratch = self._scratch(data)
        try:
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            os.link(scratch, self.path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(scratch)
        return True

    def remove(self, name: str) -> None:
        """Delete one object that this job wrote; quiet when there is none."""
        try:
            self._fs.rm_file(self.path(name))
        except FileNotFoundError:
            return

    def _scratch(self, data: bytes) -> str:
        """A complete, synced file on the same file system, under a name that no reader looks at."""
        folder = self.path(SCRATCH)
        os.makedirs(folder, exist_ok=True)
        name = join(folder, uuid.uuid4().hex)
        try:
            with open(name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if os.path.exists(name):
                os.unlink(name)
            raise
        return name


def _open(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url)
    return fs, str(root)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
