"""JSON that means one thing only: no duplicate keys, no NaN, no absurd numbers, no broken text."""

from __future__ import annotations

import json
import re
from typing import Any

from .refusal import Refusal

DIGITS = 40
"""Of an integer at most; more is no value of anything here, and slow to convert."""
DEPTH = 64
"""Of lists and objects in each other at most; what walks through them later need not be afraid of more."""
TOO_DEEP = f"it is nested too deeply, allowed are {DEPTH} levels"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_json(body: bytes) -> None:
    """Returns when the body is such JSON.

    Raises:
        Refusal: 400, it is not.
    """
    try:
        value = json.loads(body, object_pairs_hook=_once, parse_constant=_constant, parse_int=_integer)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
        if body.count(b"[") + body.count(b"{") > DEPTH:
            _check_depth(value)
    except RecursionError:
        raise _invalid(TOO_DEEP) from None
    except UnicodeError:
        raise _invalid("its text is not valid Unicode") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH + 1):
        inner = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        level = [item for items in inner for item in items]
        if not level:
            return
    raise _invalid(TOO_DEEP)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _invalid("a key appears twice in one object")
    return value


def _constant(name: str) -> None:
    raise _invalid(f"{name} is not a number")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _invalid(f"an integer has {len(digits)} digits")
    return int(digits)


def _invalid(reason: str) -> Refusal:
    return Refusal(400, "invalid_json", f"the body is not valid JSON: {reason}")
