"""How a command ends: exit codes, and one clear line instead of a traceback.

0    done, or nothing to do
1    failed; a batch job goes on from there when run again
2    the command, the job or a value is not valid; nothing was started
3    refused: the output belongs to another job or driver
4    more rows are rejected than `max_rejected` allows: all is made and committed, or the plan alone was too much
130  stopped by Ctrl-C     143  stopped by SIGTERM; both can be resumed
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILED, INVALID, CONFLICT, REJECTED, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def reported(context: typer.Context) -> Iterator[None]:
    """Run a command's body; turn errors into a line on standard error and an exit code."""
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _stop("interrupted; run the same command to go on", INTERRUPTED)
    except _Terminated:
        _stop("terminated; run the same command to go on", TERMINATED)
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if context.obj:
            raise
        _stop(*_explained(error))
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _explained(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error."""
    from diffray.model.errors import DiffrayError, InvalidRequest, JobConflict, TooManyRejected
    from diffray.pipelines import InvalidJob
    from diffray.serve.config import InvalidConfig

    if isinstance(error, (InvalidJob, InvalidRequest, InvalidConfig)):
        return str(error), INVALID
    if isinstance(error, JobConflict):
        return str(error), CONFLICT
    if isinstance(error, TooManyRejected):
        return str(error), REJECTED
    if isinstance(error, DiffrayError):
        return str(error), FAILED
    return f"{type(error).__name__}: {error}", FAILED


def _stop(message: str, code: int) -> None:
    typer.echo(f"diffray: {message}", err=True)
    raise typer.Exit(code)
