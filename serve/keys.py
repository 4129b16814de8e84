"""API keys: who may ask, and how much.

A key is shown once, when it is made; the file keeps its SHA-256 only. Keys are long and random, so that a
plain hash is enough. The file is read again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from pathlib import Path

from limits import parse
from pydantic import Field, ValidationError, field_validator

from .config import InvalidConfig, Strict

VARIABLE = "DIFFRAY_API_KEYS"
PREFIX = "dr-"
CHECK_SECONDS = 1.0


class Key(Strict):
    """One key of the file. Limits that are None are the service's."""

    id: str
    """Of whom it is; two keys with one id share its limits and jobs, which makes rotation easy."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str
    requests: str | None = None
    """Such as "100/minute"."""
    cost: str | None = None
    """Megapixel-steps, such as "5000/hour"."""
    images_at_once: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0)
    """Share of the engines beside other clients'."""

    @field_validator("requests", "cost")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None:
            parse(value)  # raises ValueError
        return value


class KeyFile(Strict):
    """The file's content."""

    keys: tuple[Key, ...] = ()


class Keys:
    """The keys of a service, from a file and the environment.

    Raises:
        InvalidConfig: the file cannot be read, or the variable of the environment holds no key.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._fixed = tuple(_of_environment(token) for token in _tokens())
        self._read: tuple[Key, ...] = ()
        self._stamp: tuple[int, int, int] | None = None
        self._checked = 0.0
        self._refresh()

    @property
    def required(self) -> bool:
        """Whether keys are asked for; see `configured`."""
        return self._path is not None or bool(self._fixed)

    def find(self, token: str) -> Key | None:
        """The key that this token opens. Takes the same time whichever it is."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self._refresh()
        digest = _digest(token)
        found = None
        for key in (*self._fixed, *self._read):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        """Read the file again if it changed. While it cannot be read, the keys that were known stay."""
        self._checked = time.monotonic()
        if self._path is None:
            return
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._read = read(self._path).keys
                self._stamp = stamp
        except (OSError, InvalidConfig):
            if self._stamp is None:
                raise InvalidConfig(
                    f"{self._path}: no readable key file; make one with: diffray keys add"
                ) from None


def configured(path: str | None) -> bool:
    """Whether a service with this key file, or none, has keys: those of the file or of the environment.

    Raises:
        InvalidConfig: the variable of the environment holds no key.
    """
    return path is not None or bool(_tokens())


def read(path: Path) -> KeyFile:
    """The key file.

    Raises:
        InvalidConfig: it is none.
        OSError: it cannot be read.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InvalidConfig(f"{path}: not a key file: {error.errors()[0]['msg']}") from None


def add(path: Path, id: str, **limits: object) -> str:
    """Make a key for `id`, write it to the file, and return the token, which is kept nowhere.

    Raises:
        InvalidConfig: the file is something else, or a limit is not valid.
    """
    known = read(path).keys if path.exists() else ()
    token = PREFIX + secrets.token_urlsafe(32)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        key = Key.model_validate({"id": id, "sha256": _digest(token), "created": created, **limits})
    except ValidationError as error:
        raise InvalidConfig(f"key: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    write(path, KeyFile(keys=(*known, key)))
    return token


def revoke(path: Path, id: str, *, but_newest: bool = False) -> int:
    """Take the keys of `id` out of the file, all or all but the newest. Returns how many."""
    known = read(path).keys
    theirs = [key for key in known if key.id == id]
    gone = theirs[:-1] if but_newest else theirs
    write(path, KeyFile(keys=tuple(key for key in known if key not in gone)))
    return len(gone)


def write(path: Path, content: KeyFile) -> None:
    """Replace the file in one step; nobody else may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content.model_dump(mode="json", exclude_none=True), file, indent=2)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _tokens() -> list[str]:
    """What the variable of the environment holds. One without a token is a mistake that would open the service."""
    if (text := os.environ.get(VARIABLE)) is None:
        return []
    tokens = [token.strip() for token in text.split(",") if token.strip()]
    if not tokens:
        raise InvalidConfig(f"{VARIABLE} is set and holds no key: put keys into it, or unset it")
    return tokens


def _of_environment(token: str) -> Key:
    digest = _digest(token)
    return Key(id=f"env-{digest[:8]}", sha256=digest, created="")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
