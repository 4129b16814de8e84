"""Where results of jobs and published pictures lie: a local folder or an object store."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress

from fsspec.implementations.local import LocalFileSystem

from diffray.model.storage import open_storage

from .config import InvalidConfig, Store


class Files:
    """The store: names of files below one folder or URL. Made when it is first needed."""

    def __init__(self, config: Store) -> None:
        self._temporary = None if config.url else tempfile.mkdtemp(prefix="diffray-jobs-")
        try:
            self._fs, self._root = open_storage(config.url or str(self._temporary), config.options)
        except (ImportError, ValueError) as error:
            raise InvalidConfig(f"store.url: {error}") from None

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file."""
        if isinstance(self._fs, LocalFileSystem):  # object stores have no folders
            self._fs.makedirs(f"{self._root}/{name.rpartition('/')[0]}", exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{name}", data)

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(f"{self._root}/{name}"))

    def places(self) -> list[str]:
        """All jobs' names, as <client>/<job>."""
        with suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, maxdepth=3)
            parts = [path[len(self._root) :].strip("/").split("/") for path in found]
            return sorted({f"{p[0]}/{p[1]}" for p in parts if len(p) == 3})
        return []

    def remove(self, place: str) -> None:
        """Delete a job."""
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{place}", recursive=True)

    def close(self) -> None:
        """Delete the folder if it was only a temporary one."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
