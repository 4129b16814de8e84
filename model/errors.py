"""Every error diffray raises on purpose.

    DiffrayError
    ├── InvalidRequest       a request field is outside its allowed range (one row, one HTTP body)
    ├── CheckpointError      a checkpoint cannot be read, recognised or filled completely
    │   └── UnsafeCheckpoint it would have to be unpickled to be read
    ├── GenerationError      one image failed while it was made (non-finite output)
    │   └── OutOfMemory      it needs more memory than the device has, even alone
    ├── Cancelled            the caller took the image back
    └── JobError             a batch job refuses to start or go on
        ├── JobConflict      the output belongs to another job, or config, model or input changed
        ├── StorageError     the output cannot be read or written: full, out of reach, access refused
        ├── AccountingError  planned images, written images and rejected rows do not add up
        └── TooManyRejected  more rows were rejected than the job allows

A message names the object (row id, file, tensor key, field), what was got and what is allowed.
"""

from __future__ import annotations


class DiffrayError(Exception):
    """Base of every error raised on purpose."""


class InvalidRequest(DiffrayError, ValueError):
    """A request field has a value that is not allowed.

    Attributes:
        field: the name of the offending request field.
        reason: what was got and what is allowed.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.field, self.reason)


class CheckpointError(DiffrayError):
    """A checkpoint cannot be read, recognised or filled completely."""


class UnsafeCheckpoint(CheckpointError):
    """Reading the file would unpickle it; `diffray convert` does that offline, in a subprocess."""


class GenerationError(DiffrayError):
    """One image failed while it was made."""


class OutOfMemory(GenerationError):
    """One image needs more memory than the device has, even alone: a smaller one may fit, another seed does not."""


class Cancelled(DiffrayError):
    """The caller took the image back before it was finished."""


class JobError(DiffrayError):
    """A batch job refuses to start or to go on."""


class JobConflict(JobError):
    """The output belongs to another job, or the job's config, model or input has changed."""


class StorageError(JobError):
    """The output cannot be read or written: full, out of reach, or access is refused. Work so far is kept."""


class AccountingError(JobError):
    """Planned images, written images and rejected rows do not add up."""


class TooManyRejected(JobError):
    """More of a job's rows were rejected than it allows. What was made is committed and reported."""
