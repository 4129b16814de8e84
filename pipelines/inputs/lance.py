"""Versions of Lance datasets, and the cells of their rows.

A dataset keeps its versions. A job is planned from the newest; its workers read that same version, recognised by
its digest, whatever was written meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from posixpath import basename
from typing import Any

import pyarrow as pa

from ..config import InvalidJob

ENDING = ".lance"
_S3 = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "endpoint_url": "aws_endpoint",
    "region_name": "aws_region",
    "anon": "aws_skip_signature",
}
"""fsspec's names of storage options, and those of Lance: https://lance.org/guide/object_store/"""
_NOT_FOR_LANCE = ("config_kwargs",)
"""Of fsspec's client alone."""
_BLOB = b"lance-encoding:blob"


def open_lance(url: str, options: Mapping[str, Any], version: int | None = None) -> Any:
    """A version of a dataset, the newest by default.

    Raises:
        InvalidJob: the library is not installed, or has no such option.
        FileNotFoundError: there is no such dataset or version.
        OSError: the storage does not answer.
    """
    try:
        import lance
    except ImportError:
        raise InvalidJob(
            f"input {url}: Lance datasets are read by a library of their own: pip install 'diffray[lance]'"
        ) from None
    own = _options(url, options) or None
    try:
        return lance.dataset(url, version=version, storage_options=own)
    except ValueError as error:  # Lance has no other type for either
        kind = FileNotFoundError if "was not found" in str(error) else OSError
        raise kind(f"{url}: {error}") from None


def lance_url(fs: Any, path: str) -> str:
    """What Lance calls a path of a filesystem of fsspec's."""
    return path if getattr(fs, "local_file", False) else str(fs.unstrip_protocol(path))


def lance_digest(dataset: Any) -> dict[str, Any]:
    """What a version holds: the names of its files, which are never written again, and the rows deleted of each."""
    parts = [json.dumps(fragment.metadata.to_json(), sort_keys=True) for fragment in dataset.get_fragments()]
    return {
        "name": basename(dataset.uri.rstrip("/")),
        "version": dataset.version,
        "rows": dataset.count_rows(),
        "parts": [hashlib.sha256(part.encode()).hexdigest() for part in parts],
    }


class LanceTable:
    """Random access to the rows of a dataset.

    Args:
        url: of the dataset.
        options: fsspec's, for its storage.
        planned: what the plan's input was; None reads the newest version.

    Raises:
        FileNotFoundError: it is gone, or no version of it is what the plan saw.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any], planned: Sequence[Mapping[str, Any]] | None
    ) -> None:
        if planned is None:
            self._dataset = open_lance(url, options)
        else:
            name = basename(url.rstrip("/"))
            versions = (
                (entry, open_lance(url, options, entry["version"]))
                for entry in planned
                if entry["name"] == name
            )
            found = (dataset for entry, dataset in versions if lance_digest(dataset) == dict(entry))
            self._dataset = next(found, None)
            if self._dataset is None:
                raise FileNotFoundError(url)
        self.rows: int = self._dataset.count_rows()
        self.schema: pa.Schema = self._dataset.schema

    def value(self, row: int, column: str) -> Any:
        """The value of a cell as a Python object."""
        field = self.schema.field(column)
        if (field.metadata or {}).get(_BLOB) == b"true":
            [blob] = self._dataset.take_blobs(column, indices=[row])
            return blob.readall()
        return self._dataset.take([row], columns=[column]).column(0)[0].as_py()


def _options(url: str, options: Mapping[str, Any]) -> dict[str, str]:
    if odd := sorted(options.keys() - _S3.keys() - {*_NOT_FOR_LANCE}):
        raise InvalidJob(
            f"input {url}: Lance has no storage option {odd[0]}, allowed are {', '.join(_S3)}; "
            "it also takes AWS_PROFILE and the like from the environment"
        )
    known = {_S3[name]: str(value) for name, value in options.items() if name in _S3}
    plain = known.get("aws_endpoint", "").startswith("http://")
    return known | ({"allow_http": "true"} if plain else {})
