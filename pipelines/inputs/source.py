"""The input of a job as a stream of rows, in file order, with the place where each row stands.

Read by this file rather than by Ray Data: ids, seeds and shards depend on row order and on line numbers,
and one bad line must cost one row. Memory stays constant whatever a table's size; only the list of files is kept.

    .csv .tsv          a header line, then one record per row; an empty cell says nothing
    .jsonl .ndjson     one JSON object per line
    .parquet .arrow    tables; cells of bytes are left where they are
    .txt               one prompt per line
    .tar               WebDataset: members of one name are a row
    .lance             Lance datasets, which are folders; the newest version

A glob is all files it matches, a folder all such files below it, in name order; names that begin with `_` or
`.` are passed by. Links to files are followed, a folder with a link to another folder is refused. Three kinds
of folders are more than that: one that `datasets` saved to disk is its Arrow files in their order; one with
pictures and tables named `metadata` is these tables (the imagefolder convention), whose `file_name` leads to
the pictures; one with pictures and no table is one row per picture, with its sub-folder's name as `label` and
the text file of the same name, if there is one, as `prompt`. `.gz`, `.bz2`, `.xz` and `.zst` are unpacked,
except around tables of bytes and tars. Tables may be behind `http://`, pictures may not.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from posixpath import basename, commonpath, dirname, relpath, splitext
from typing import Any

import pyarrow as pa

from diffray.model.storage import open_storage

from ..config import InvalidJob
from ..parallel import side_by_side
from .columnar import features, read_lance, stated_schema
from .formats import COLUMNAR, READERS, WHOLE, ending
from .lance import ENDING as LANCE
from .lance import lance_digest, lance_url, open_lance
from .listing import Found, expanded, wildcard
from .readers import SourceRow, checked, is_text
from .stamps import Stamps, listed_stamp, refuse_http

CHUNK = 1 << 18
WHOLE_BELOW = 1 << 26
SAMPLES = 16
"""A file of `WHOLE_BELOW` bytes or more is digested by so many chunks, the first and the last ones among them."""


class Source:
    """The input of one job.

    Args:
        inputs: files, folders, globs or URLs, all on one storage and with the same options.
        storage: fsspec options of a URL, as `JobConfig.storage_options` gives them.
        limit: only so many rows.

    Attributes:
        files: full paths of everything that is read.
        root: absolute path or URL of the folder that all of it is in; `SourceRow.file` is relative to it.

    Raises:
        InvalidJob: there is no such file, one has an unknown ending, or they are on different storages.
    """

    def __init__(
        self,
        inputs: str | Sequence[str],
        storage: Callable[[str], Mapping[str, Any]] = lambda url: {},
        limit: int | None = None,
    ) -> None:
        urls = [inputs] if isinstance(inputs, str) else list(inputs)
        found, self._limit, self._storage = [], limit, storage
        for url in urls:
            try:
                self._fs, path = open_storage(url, storage(url))
                found.append(expanded(self._fs, path))
            except InvalidJob:
                raise
            except (ValueError, ImportError, OSError) as error:
                raise InvalidJob(f"input {url}: {error}") from None
            if not found[-1].files:
                raise InvalidJob(f"input {url}: no such file, or a folder without input files")
            if found[-1].pictures:
                refuse_http(url)
        if len({url.partition("://")[0] if "://" in url else "file" for url in urls}) != 1:
            raise InvalidJob(f"input: expected one or more places on the same storage, got {urls}")
        self._found = found
        self.files = tuple(path for one in found for path in one.files)
        if odd := next((p for one in found if not one.pictures for p in one.files if not is_text(p)), None):
            raise InvalidJob(f"input {odd!r}: its name is not valid UTF-8")
        self._root = _common([one.root for one in found])
        self.root = self._root if "://" not in urls[0] else str(self._fs.unstrip_protocol(self._root))
        for url in urls:  # workers read all of it by the options of the root
            if storage(url) != storage(self.root):
                raise InvalidJob(
                    f"input {url}: its storage options are not those of {self.root}, the folder of all inputs; "
                    "give the options to that folder or to its protocol"
                )
        self.features: dict[str, dict[str, Any]] = {}
        """What a Hugging Face dataset says about its columns, filled by `schema`."""
        self.stamps: dict[str, str] = {}
        """Of the pictures that are rows themselves, by name, as `fingerprint` last saw them."""

    def looks_into(self, folder: str) -> bool:
        """Whether files that appear in this folder may be read as input too."""
        return any(one.looks_into(folder) for one in self._found)

    def rows(self) -> Iterator[SourceRow]:
        """All rows of all files.

        Raises:
            InvalidJob: a file cannot be read as what its ending says (no header, broken Parquet).
        """
        return islice((row for one in self._found for row in self._rows(one)), self._limit)

    def _rows(self, found: Found) -> Iterator[SourceRow]:
        if found.pictures:
            yield from self._pictures(found)
            return
        for path in found.files:
            try:
                if ending(path) == LANCE:
                    yield from read_lance(self._lance(path), self._name(path))
                    continue
                with self._opened(path) as file:
                    yield from READERS[ending(path)](file, self._name(path))
            except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
                raise InvalidJob(f"input {path}: {error}") from None

    def _pictures(self, found: Found) -> Iterator[SourceRow]:
        texts = {splitext(path)[0]: path for path in found.files if path.endswith(".txt")}
        pictures = [path for path in found.files if not path.endswith(".txt")]
        own = (texts.get(splitext(path)[0]) for path in pictures)
        # Other storages take a while for each.
        several = map if not texts or getattr(self._fs, "local_file", False) else side_by_side
        for line, (path, text) in enumerate(zip(pictures, several(self._text, own), strict=True), start=1):
            values: dict[str, Any] = {"file_name": self._name(path)}
            if folder := relpath(dirname(path), found.root).removeprefix("."):
                values["label"] = basename(folder)
            if text is not None:
                values["prompt"] = text
            yield checked(self._name(found.root), line, values)

    def _text(self, path: str | None) -> str | None:
        if path is None:
            return None
        try:
            return str(self._fs.cat_file(path).decode("utf-8", "surrogateescape")).strip()
        except OSError as error:
            raise InvalidJob(f"input {path}: {error}") from None

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every table, and of the list of a folder's pictures with their stamps.

        The files are those that were found at first, looked at again.

        Raises:
            InvalidJob: one of them is gone.
            JobError: the storage does not answer.
        """
        digests = [
            digest
            for one in self._found
            for digest in ([self._listing(one)] if one.pictures else map(self._digest, one.files))
        ]
        return digests if self._limit is None else [*digests, {"name": "", "limit": self._limit}]

    def schema(self) -> pa.Schema | None:
        """The columns and their types where the files state them (Parquet, Arrow), else None."""
        if any(one.pictures for one in self._found) or any(ending(p) not in COLUMNAR for p in self.files):
            return None
        schemas = []
        for path in self.files:
            try:
                if ending(path) == LANCE:
                    schemas.append(self._lance(path).schema)
                else:
                    with self._opened(path) as file:
                        schemas.append(stated_schema(file, path))
            except (OSError, pa.ArrowException) as error:
                raise InvalidJob(f"input {path}: {error}") from None
            self.features |= features(schemas[-1])
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise InvalidJob(f"input files disagree about a column: {error}") from None

    def _opened(self, path: str) -> Any:
        if path.lower().endswith(".zst"):  # fsspec would need another library for it
            packed = pa.PythonFile(self._fs.open(path, "rb"), mode="r")
            return io.BufferedReader(pa.CompressedInputStream(packed, "zstd"))
        return self._fs.open(path, "rb", compression=None if ending(path) in WHOLE else "infer")

    def _lance(self, path: str) -> Any:
        url = lance_url(self._fs, path)
        return open_lance(url, self._storage(url))

    def _name(self, path: str) -> str:
        return relpath(path, self._root)

    def _digest(self, path: str) -> dict[str, Any]:
        """Of the whole file, or of chunks spread over a large one; beginning and end are always among them."""
        if ending(path) == LANCE:
            return lance_digest(self._lance(path))
        digest = hashlib.sha256()
        try:
            size = int(self._fs.size(path) or 0)
            if size < WHOLE_BELOW or ending(path) not in WHOLE:
                with self._fs.open(path, "rb") as file:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
            else:  # no open file: reading ahead, it would fetch ten times as much
                starts = [(size - CHUNK) * i // (SAMPLES - 1) for i in range(SAMPLES)]
                ends = [start + CHUNK for start in starts]
                for chunk in self._fs.cat_ranges([path] * SAMPLES, starts, ends, on_error="raise"):
                    digest.update(chunk)
        except FileNotFoundError:
            raise _gone(path) from None
        return {"name": basename(path), "bytes": size, "sha256": digest.hexdigest()}

    def _listing(self, found: Found) -> dict[str, Any]:
        digest = hashlib.sha256()
        self._fs.invalidate_cache()  # some storages answer from what they listed before
        infos = found.listed(self._fs)  # one listing instead of a question per file
        told = {self._name(path): listed_stamp(infos[path]) for path in found.files if path in infos}
        now = Stamps(self.root, self._storage, told).of(map(self._name, found.files))
        for path in found.files:
            name = self._name(path)
            if (known := now[name]) is not None:
                self.stamps[name] = known
            elif not infos.get(path, {}).get("islink"):  # a link that leads nowhere costs its row
                raise _gone(path)
            digest.update(f"{name}\0{known}\n".encode("utf-8", "surrogateescape"))
        return {"name": basename(found.root), "files": len(found.files), "sha256": digest.hexdigest()}


def input_root(inputs: Sequence[str], storage: Callable[[str], Mapping[str, Any]]) -> str:
    """`Source.root` of these inputs, without looking for their files."""
    roots = []
    for url in inputs:
        fs, path = open_storage(url, storage(url))
        wild = wildcard(fs, path)
        folder = fs.isdir(path) and ending(path) != LANCE
        roots.append(dirname(path[:wild] + "x") if wild >= 0 else path if folder else dirname(path))
    common = _common(roots)
    return common if "://" not in inputs[0] else str(fs.unstrip_protocol(common))


def _common(paths: Sequence[str]) -> str:
    """The folder that all of these are in; fsspec's paths of http are URLs."""
    scheme, mark, _ = paths[0].rpartition("://")
    return scheme + mark + commonpath([path.removeprefix(scheme + mark) for path in paths])


def _gone(path: str) -> InvalidJob:
    return InvalidJob(
        f"input {path} is gone: the input changed while it was read; run again when it is complete"
    )
