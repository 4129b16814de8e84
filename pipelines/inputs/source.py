"""The input of a job as a stream of rows, in file order, with the place where each row stands.

Read by this file rather than by Ray Data: ids, seeds and shards depend on row order and on line numbers,
and one bad line must cost one row. Memory stays constant whatever a table's size; only the list of files is kept.

    .csv .tsv          a header line, then one record per row; an empty cell says nothing
    .jsonl .ndjson     one JSON object per line
    .parquet .arrow    tables; cells of bytes are left where they are
    .txt               one prompt per line
    .tar               WebDataset: members of one name are a row
    .lance             Lance datasets, which are folders; the newest version

A glob is all files it matches, a folder all such files below it, in name order; names that begin with `_` or `.`
are passed by. Three kinds of folders are more than that: one that `datasets` saved to disk is its Arrow files in
their order; one with pictures and tables named `metadata` is these tables (the imagefolder convention), whose
`file_name` leads to the pictures; one with pictures and no table is one row per picture, with its sub-folder's
name as `label` and the text file of the same name, if there is one, as `prompt`. `.gz`, `.bz2`, `.xz` and `.zst`
are unpacked, except around tables of bytes and tars.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from posixpath import basename, commonpath, dirname, join, relpath, splitext
from typing import IO, Any

import pyarrow as pa

from diffray.model.storage import open_storage

from ..config import InvalidJob
from .archives import read_tar
from .columnar import features, read_arrow, read_lance, read_parquet, stated_schema
from .lance import ENDING as LANCE
from .lance import lance_digest, lance_url, open_lance
from .readers import SourceRow, checked, read_csv, read_jsonl, read_text, read_tsv
from .stamps import stamp

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 20
SAMPLED_ABOVE = 64
"""Chunks of a file beyond which its digest is that of so many chunks spread over it."""

Reader = Callable[[IO[bytes], str], Iterator[SourceRow]]
READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".tar": read_tar,
}
COLUMNAR = (".parquet", ".arrow", LANCE)
WHOLE = (*COLUMNAR, ".tar")
"""Read by position, so never through a decompressor."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True, slots=True)
class _Found:
    """What one input stands for: files to read one by one, or the pictures of a folder, which are rows themselves."""

    root: str
    files: Sequence[str]
    pictures: bool = False
    deep: bool = False
    """Whether files that appear in folders below `root` would be read too."""


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
                found.append(_expanded(self._fs, path))
            except (ValueError, ImportError, OSError) as error:
                raise InvalidJob(f"input {url}: {error}") from None
            if not found[-1].files:
                raise InvalidJob(f"input {url}: no such file, or a folder without input files")
        if len({url.partition("://")[0] if "://" in url else "file" for url in urls}) != 1:
            raise InvalidJob(f"input: expected one or more places on the same storage, got {urls}")
        self._found = found
        self.files = tuple(path for one in found for path in one.files)
        self._root = commonpath([one.root for one in found])
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
        return any(
            one.deep and any(_visible(one.root, [folder])) for one in self._found if _below(folder, one.root)
        )

    def rows(self) -> Iterator[SourceRow]:
        """All rows of all files.

        Raises:
            InvalidJob: a file cannot be read as what its ending says (no header, broken Parquet).
        """
        return islice((row for one in self._found for row in self._rows(one)), self._limit)

    def _rows(self, found: _Found) -> Iterator[SourceRow]:
        if found.pictures:
            yield from self._pictures(found)
            return
        for path in found.files:
            try:
                if _ending(path) == LANCE:
                    yield from read_lance(self._lance(path), self._name(path))
                    continue
                with self._opened(path) as file:
                    yield from READERS[_ending(path)](file, self._name(path))
            except (OSError, EOFError, pa.ArrowException) as error:
                raise InvalidJob(f"input {path}: {error}") from None

    def _pictures(self, found: _Found) -> Iterator[SourceRow]:
        texts = {splitext(path)[0]: path for path in found.files if path.endswith(".txt")}
        pictures = [path for path in found.files if not path.endswith(".txt")]
        for line, path in enumerate(pictures, start=1):
            values: dict[str, Any] = {"file_name": self._name(path)}
            if folder := relpath(dirname(path), found.root).removeprefix("."):
                values["label"] = basename(folder)
            if text := texts.get(splitext(path)[0]):
                values["prompt"] = self._fs.cat_file(text).decode("utf-8", "surrogateescape").strip()
            yield checked(self._name(found.root), line, values)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every table, and of the list of a folder's pictures with their stamps."""
        return [
            digest
            for one in self._found
            for digest in ([self._listing(one)] if one.pictures else map(self._digest, one.files))
        ]

    def schema(self) -> pa.Schema | None:
        """The columns and their types where the files state them (Parquet, Arrow), else None."""
        if any(one.pictures for one in self._found) or any(_ending(p) not in COLUMNAR for p in self.files):
            return None
        schemas = []
        for path in self.files:
            try:
                if _ending(path) == LANCE:
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
        return self._fs.open(path, "rb", compression=None if _ending(path) in WHOLE else "infer")

    def _lance(self, path: str) -> Any:
        url = lance_url(self._fs, path)
        return open_lance(url, self._storage(url))

    def _name(self, path: str) -> str:
        return relpath(path, self._root)

    def _digest(self, path: str) -> dict[str, Any]:
        """Of the whole file, or of chunks spread over a large one; beginning and end are always among them."""
        if _ending(path) == LANCE:
            return lance_digest(self._lance(path))
        digest, size = hashlib.sha256(), int(self._fs.size(path) or 0)
        with self._fs.open(path, "rb") as file:
            if size <= SAMPLED_ABOVE * CHUNK or _ending(path) not in WHOLE:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            else:
                for i in range(SAMPLED_ABOVE):
                    file.seek((size - CHUNK) * i // (SAMPLED_ABOVE - 1))
                    digest.update(file.read(CHUNK))
        return {"name": basename(path), "bytes": size, "sha256": digest.hexdigest()}

    def _listing(self, found: _Found) -> dict[str, Any]:
        digest = hashlib.sha256()
        self._fs.invalidate_cache()  # some storages answer from what they listed before
        infos = self._fs.find(found.root, detail=True)  # one listing instead of a question per file
        for path in found.files:
            name, known = self._name(path), stamp(infos[path])
            self.stamps[name] = known
            digest.update(f"{name}\0{known}\n".encode("utf-8", "surrogateescape"))
        return {"name": basename(found.root), "files": len(found.files), "sha256": digest.hexdigest()}


def input_root(inputs: Sequence[str], storage: Callable[[str], Mapping[str, Any]]) -> str:
    """`Source.root` of these inputs, without looking for their files."""
    roots = []
    for url in inputs:
        fs, path = open_storage(url, storage(url))
        wild = _wildcard(path)
        folder = fs.isdir(path) and _ending(path) != LANCE
        roots.append(dirname(path[:wild] + "x") if wild >= 0 else path if folder else dirname(path))
    common = commonpath(roots)
    return common if "://" not in inputs[0] else str(fs.unstrip_protocol(common))


def _wildcard(path: str) -> int:
    """Where the first wildcard is, -1 without one."""
    return min((path.index(c) for c in "*?[" if c in path), default=-1)


def _expanded(fs: Any, path: str) -> _Found:
    """The files that one input stands for.

    Raises:
        InvalidJob: it is something that is not read.
    """
    if (wild := _wildcard(path)) >= 0:
        root = dirname(path[:wild] + "x")
        found = _tables_or_pictures(root, list(_visible(root, fs.glob(path))))
        return replace(found, deep="/" in path[wild:])
    if _ending(path) == LANCE:
        return _Found(dirname(path), [path] if fs.isdir(path) else [])
    if not fs.isdir(path):
        if not fs.exists(path):
            return _Found(dirname(path), [])
        if splitext(path)[1].lower() not in PICTURES:
            _check_ending(path)
        return _tables_or_pictures(dirname(path), [path])
    if saved := _saved_to_disk(fs, path):
        return _Found(path, saved)
    return replace(_tables_or_pictures(path, list(_visible(path, fs.find(path)))), deep=True)


def _tables_or_pictures(root: str, paths: Sequence[str]) -> _Found:
    tables = [p for p in paths if _ending(p) in (*READERS, LANCE)]
    pictures = [p for p in paths if splitext(p)[1].lower() in PICTURES]
    if not pictures:
        return _Found(root, tables)
    if metadata := [p for p in tables if splitext(basename(p))[0] == "metadata"]:
        return _Found(root, metadata)
    stems = {splitext(p)[0] for p in pictures}
    if all(p.endswith(".txt") and splitext(p)[0] in stems for p in tables):
        return _Found(root, pictures + tables, pictures=True)
    return _Found(root, tables)


def _saved_to_disk(fs: Any, folder: str) -> list[str]:
    """The files of a dataset that `datasets` saved, in its order; none if it is no such folder."""
    if fs.exists(join(folder, "dataset_dict.json")):
        splits = json.loads(fs.cat_file(join(folder, "dataset_dict.json")))["splits"]
        raise InvalidJob(
            f"input {folder} holds several splits, choose one: {', '.join(join(folder, s) for s in splits)}"
        )
    if not (fs.exists(join(folder, "state.json")) and fs.exists(join(folder, "dataset_info.json"))):
        return []
    state = json.loads(fs.cat_file(join(folder, "state.json")))
    if state.get("_indices_data_files"):
        raise InvalidJob(f"input {folder} is a selection of rows; call flatten_indices() before it is saved")
    return [join(folder, file["filename"]) for file in state["_data_files"]]


def _below(path: str, root: str) -> bool:
    return path.startswith(f"{root.rstrip('/')}/")


def _visible(root: str, paths: Sequence[str]) -> Iterator[str]:
    """Those without a hidden part below `root`, in name order; a Lance dataset in place of the files in it."""
    whole = (re.sub(rf"(?<={re.escape(LANCE)})/.*", "", str(path), flags=re.DOTALL) for path in paths)
    for path in sorted(set(whole)):
        below = path[len(root) :]
        if "/_" not in below and "/." not in below:
            yield path


def _ending(path: str) -> str:
    stem, ending = splitext(path.lower())
    return splitext(stem)[1] if ending in COMPRESSED else ending


def _check_ending(path: str) -> None:
    ending = _ending(path)
    if ending not in READERS:
        raise InvalidJob(f"input {path}: allowed endings are {', '.join((*READERS, LANCE))}")
    if ending in WHOLE and not path.lower().endswith(ending):
        raise InvalidJob(f"input {path}: unpack it first; {ending} files are read by position")
