"""The one way in which the service says no."""

from __future__ import annotations

from diffray.model import DiffrayError


class Refusal(DiffrayError):
    """An answer that is not an image; every dialect writes it in its own form.

    Attributes:
        status: the HTTP status.
        code: a stable word for programs, e.g. "queue_full", "rate_limited", "invalid_value", "unauthorized".
        message: for people; never holds a path, a host or a traceback.
        field: the request field that is to blame, by the name the client used.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.field, self.retry_after = field, retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.status, self.code, self.message, self.field, self.retry_after)


def _again(status: int, code: str, message: str, field: str | None, retry_after: float | None) -> Refusal:
    return Refusal(status, code, message, field=field, retry_after=retry_after)
