"""The files that one input stands for: a file, a glob, or one of several kinds of folders (see `source.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename, dirname, join, splitext
from typing import Any

from ..config import InvalidJob
from .formats import READERS, check_ending, ending, is_picture
from .lance import ENDING as LANCE


@dataclass(frozen=True, slots=True)
class Found:
    """What one input stands for: files to read one by one, or the pictures of a folder, which are rows themselves."""

    input: str
    """As it was given."""
    root: str
    files: Sequence[str]
    pictures: bool = False
    deep: bool = False
    """Whether files that appear in folders below `root` would be read too."""

    def looks_into(self, folder: str) -> bool:
        """Whether files that appear in this folder may be read too."""
        below = folder.startswith(f"{self.root.rstrip('/')}/")
        return self.deep and below and any(_visible(self.root, [folder]))

    def listed(self, fs: Any) -> Mapping[str, Mapping[str, Any]]:
        """What a listing of no more than the input says about its files now; of a single file it would say nothing."""
        if wildcard(fs, self.input) >= 0:
            found: dict[str, dict[str, Any]] = fs.glob(self.input, detail=True)
        else:
            found = fs.find(self.root, detail=True) if self.deep else {}
        return found


def wildcard(fs: Any, path: str) -> int:
    """Where the first wildcard is, -1 without one, or where something has just that name: `prompts[1].csv`."""
    first = min((path.index(c) for c in "*?[" if c in path), default=-1)
    return -1 if first < 0 or fs.exists(path) else first


def expanded(fs: Any, path: str) -> Found:
    """The files that one input stands for.

    Raises:
        InvalidJob: it is something that is not read.
    """
    if (wild := wildcard(fs, path)) >= 0:
        root = dirname(path[:wild] + "x")
        return Found(path, root, *_chosen(_visible(root, fs.glob(path))), deep="/" in path[wild:])
    if ending(path) == LANCE:
        return Found(path, dirname(path), [path] if fs.isdir(path) else [])
    if not fs.isdir(path):
        if not fs.exists(path):
            return Found(path, dirname(path), [])
        if not is_picture(path):
            check_ending(path)
        return Found(path, dirname(path), *_chosen([path]))
    if fs.exists(join(path, "_diffray")):
        raise InvalidJob(
            f"input {path} is a dataset of diffray: give its {join(path, 'data')}, or another part"
        )
    if saved := _saved_to_disk(fs, path):
        return Found(path, path, saved)
    infos = fs.find(path, detail=True)
    links = (name for name, info in infos.items() if info.get("islink") and fs.isdir(name))
    if link := next(_visible(path, [*links]), None):
        raise InvalidJob(f"input {path}: {link} is a link, which is not followed; give folders one by one")
    return Found(path, path, *_chosen(_visible(path, [*infos])), deep=True)


def _chosen(paths: Iterable[str]) -> tuple[list[str], bool]:
    """Those that are read, and whether they are pictures and their texts rather than tables."""
    paths = list(paths)
    tables = [p for p in paths if ending(p) in (*READERS, LANCE)]
    pictures = [p for p in paths if is_picture(p)]
    if not pictures:
        return tables, False
    if metadata := [p for p in tables if splitext(basename(p))[0] == "metadata"]:
        return metadata, False
    stems = {splitext(p)[0] for p in pictures}
    if all(p.endswith(".txt") and splitext(p)[0] in stems for p in tables):
        return pictures + tables, True
    return tables, False


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


def _visible(root: str, paths: Sequence[str]) -> Iterator[str]:
    """Those without a hidden part below `root`, in name order; a Lance dataset in place of the files in it."""
    whole = (re.sub(rf"(?<={re.escape(LANCE)})/.*", "", str(path), flags=re.DOTALL) for path in paths)
    for path in sorted(set(whole)):
        below = path[len(root) :]
        if "/_" not in below and "/." not in below:
            yield path
