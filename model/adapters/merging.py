"""The adapters of a loaded model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from ..weights.safefile import WeightFile
from ..weights.source import resolve
from .choices import NAME, NAMES, AdapterChoice, check_known


class Adapters:
    """What `load_model(adapters=)` was given.

    Attributes:
        names: of all adapters, sorted.
    """

    def __init__(self, files: Mapping[str, WeightFile] | None = None) -> None:
        self._files = dict(files or {})
        self.names = tuple(sorted(self._files))

    def check(self, choices: Iterable[AdapterChoice]) -> None:
        """Raises InvalidRequest for "adapters" when one is not among `names`."""
        check_known(choices, self.names)

    def checksums(self) -> dict[str, str]:
        """sha256 of each adapter's file, by name."""
        return {name: file_checksum(file) for name, file in self._files.items()}


def open_adapters(sources: Mapping[str, str]) -> dict[str, WeightFile]:
    """The files of adapters by name, headers read.

    Raises:
        CheckpointError: a name that is not allowed, or a file that cannot be found or read.
    """
    found = {}
    for name, source in sources.items():
        if not NAME.fullmatch(name):
            raise CheckpointError(f"adapter {name!r:.200}: a name is {NAMES}")
        found[name] = WeightFile(resolve(source))
    return found


def adapter_checksums(sources: Mapping[str, str]) -> dict[str, str]:
    """sha256 of each adapter's file, by name, without a model.

    Raises:
        CheckpointError: as `open_adapters`.
    """
    return {name: file_checksum(file) for name, file in open_adapters(sources).items()}


def file_checksum(file: WeightFile) -> str:
    """sha256 of an adapter's file, the number that model hubs publish."""
    file.check_unchanged()
    with file.path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
