"""What tells a file that is named by path from another one that was put in its place.

A stamp is text that a person can compare: `4821 bytes, ETag 9bb58f26` where the storage has checksums or versions,
else `4821 bytes, of 2026-11-28T21:19:36.123456+00:00`. A file that was only touched counts as another one.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from posixpath import join
from typing import Any

from diffray.model.errors import JobError
from diffray.model.storage import open_storage

from ..config import InvalidJob

ASKERS = 32
"""Questions at a time: an object store takes a while for each."""
_TAGS = ("md5Hash", "ETag", "etag", "blob_id")
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
"""Where the filesystems of fsspec say which version of a file it is, and when it was written."""
_HTTP = re.compile(r"(^|::)https?://")
_NO_SUCH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def stamp(info: Mapping[str, Any]) -> str:
    """The stamp of a file about which fsspec says `info`."""
    size = f"{info.get('size')} bytes"
    for name in _TAGS:
        if info.get(name):
            return f"{size}, ETag {str(info[name]).removeprefix('W/').strip(chr(34))}"
    for name in _TIMES:
        if info.get(name) is not None:  # 0 is a time too
            return f"{size}, of {_time(info[name])}"
    return size


def listed_stamp(info: Mapping[str, Any]) -> str | None:
    """The stamp of a file as far as a listing says it; None if that is too little, and the file has to be asked.

    Of a link the listing says when the link was made, not what it leads to.
    """
    known = stamp(info)
    return known if info.get("size") is not None and "," in known and not info.get("islink") else None


def same(planned: str, now: str, *, exact: bool) -> bool:
    """Whether two stamps are of the same file; only sizes count unless `exact`."""
    return planned == now or (not exact and planned.split(",")[0] == now.split(",")[0])


def is_absent(error: OSError) -> bool:
    """Whether the storage says that there is no such file, nor can be; all else may be its own trouble."""
    missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, missing) or error.errno in _NO_SUCH


def refuse_http(url: str) -> None:
    """Refuse to read pictures one by one over http, where a missing one and a server in trouble look the same.

    Raises:
        InvalidJob: it is such a URL.
    """
    if _HTTP.search(url):
        raise InvalidJob(f"pictures below {url}: not read over http, download them first")


class Stamps:
    """The stamps of files below one folder.

    Args:
        folder: path or URL.
        storage: fsspec options by URL, as `JobConfig.storage_options` gives them.
        known: stamps by path below `folder`, as far as a listing has told them.
    """

    def __init__(
        self,
        folder: str,
        storage: Callable[[str], Mapping[str, Any]],
        known: Mapping[str, str | None] | None = None,
    ) -> None:
        self.folder = folder
        self._fs, self._root = open_storage(folder, storage(folder))
        self._fs.invalidate_cache()  # some storages answer from what they listed before
        self._known = known or {}
        local = getattr(self._fs, "local_file", False)
        self._map = map if local else ThreadPoolExecutor(ASKERS, thread_name_prefix="stamp").map

    def of(self, paths: Iterable[str]) -> dict[str, str | None]:
        """The stamp of each path; None for what is no file.

        Raises:
            InvalidJob: the folder's storage cannot be asked.
            JobError: it does not answer.
        """
        paths = list(dict.fromkeys(paths))
        if paths:
            refuse_http(self.folder)
        found: dict[str, str | None] = {path: self._known.get(path) for path in paths}
        asked = [path for path in paths if found[path] is None]
        return found | dict(zip(asked, self._map(self._ask, asked), strict=True))

    def _ask(self, path: str) -> str | None:
        try:
            info = self._fs.info(join(self._root, path))
        except Exception as error:  # not all storages have errors of the system's type
            if isinstance(error, OSError) and is_absent(error):
                return None
            raise JobError(f"{path} cannot be looked at: {error}") from error
        return None if info.get("type") == "directory" else stamp(info)


def _time(value: Any) -> str:
    moment = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value
    return moment.isoformat() if isinstance(moment, datetime) else str(moment)
