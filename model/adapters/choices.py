"""Which adapters an image asks for, and how strongly: from columns, bodies and prompts to one value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import InvalidRequest

MAX_WEIGHT = 10.0
MAX_ADAPTERS = 32
NAME = re.compile(r"(?![. ])[A-Za-z0-9._ +-]{1,128}(?<! )")
NAMES = "1 to 128 of letters, digits and . _ + - or space, no dot in front"
# AUTOMATIC1111's extra network syntax; white space before a tag goes with it.
_TAG = re.compile(r"\s*<(?:lora|lyco):([^<>]*)>")


class AdapterChoice(NamedTuple):
    """One adapter of an image.

    Attributes:
        name: as the model knows it; 1 to 128 of letters, digits and `._+-` or space, without a leading dot.
        weight: -10..10, times the adapter's own scale; 0 is without it.
    """

    name: str
    weight: float = 1.0


def adapter_choices(value: Any) -> tuple[AdapterChoice, ...]:
    """The adapters that a column, a body or an option holds.

    Args:
        value: None; "name" or "name:0.8, other"; a list of such texts, of {"name", "weight"} mappings or of
            (name, weight) pairs; or one mapping.

    Raises:
        InvalidRequest: for "adapters": anything else, a name or weight that is not allowed, a name twice.
    """
    if value is None:
        return ()
    if isinstance(value, (Mapping, AdapterChoice)):
        value = [value]
    elif isinstance(value, str):
        value = value.split(",") if value.strip() else []
    elif isinstance(value, bytes) or not isinstance(value, Iterable):
        raise _refused(f"got {value!r}, allowed are names, mappings of name and weight, or pairs")
    choices = tuple(_choice(one) for one in value)
    if len(choices) > MAX_ADAPTERS:
        raise _refused(f"got {len(choices)}, allowed are at most {MAX_ADAPTERS}")
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise _refused(f"got {name!r} twice, allowed is each name once")
    return choices


def check_known(choices: Iterable[AdapterChoice], names: Iterable[str]) -> None:
    """Raises InvalidRequest for "adapters" when one is not among the names that a model has."""
    allowed = tuple(names)
    for choice in choices:
        if choice.name not in allowed:
            shown = f"one of {', '.join(allowed)}" if allowed else "none: this model has no adapters"
            raise _refused(f"got {choice.name!r}, allowed is {shown}")


def active(choices: Iterable[AdapterChoice]) -> tuple[AdapterChoice, ...]:
    """The choices that have an effect, sorted by name: equal for equal images."""
    return tuple(sorted(choice for choice in choices if choice.weight))


def prompt_adapters(prompt: str) -> tuple[str, tuple[AdapterChoice, ...]]:
    """A prompt without AUTOMATIC1111's `<lora:name:weight>` tags, and what they ask for.

    `<lyco:...>` means the same; without a weight it is 1. Weights per network, `te=` and `unet=` or a third
    number, are allowed where they are equal.

    Raises:
        InvalidRequest: for "prompt": a tag that cannot be followed.
    """
    tags = _TAG.findall(prompt)
    if not tags:
        return prompt, ()
    try:
        return _TAG.sub("", prompt).strip(), adapter_choices([_tagged(tag) for tag in tags])
    except InvalidRequest as error:
        raise InvalidRequest("prompt", error.reason) from error


def adapter_tags(choices: Iterable[AdapterChoice]) -> str:
    """The choices as tags of a prompt, what `prompt_adapters` reads."""
    return "".join(f"<lora:{choice.name}:{shown_weight(choice.weight)}>" for choice in choices)


def shown_weight(weight: float) -> str:
    """The weight's shortest text that reads back the same, 1 rather than 1.0."""
    return str(int(weight)) if weight.is_integer() else repr(weight)


def _choice(value: Any) -> AdapterChoice:
    if isinstance(value, str):
        name, colon, weight = value.partition(":")
        return _checked(name.strip(), _number(name, weight) if colon else 1.0)
    if isinstance(value, Mapping):
        if "name" not in value or not value.keys() <= {"name", "weight"}:
            raise _refused(f"got {dict(value)!r}, allowed are name and weight")
        given = value.get("weight")
        return _checked(value["name"], 1.0 if given is None else given)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return _checked(*value)
    raise _refused(f"got {value!r}, allowed is a name, a mapping of name and weight, or a pair")


def _checked(name: Any, weight: Any) -> AdapterChoice:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refused(f"got name {name!r:.200}, allowed are {NAMES}")
    try:
        number = math.nan if isinstance(weight, (bool, str, bytes)) else float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not -MAX_WEIGHT <= number <= MAX_WEIGHT:
        raise _refused(f"{name}: got weight {weight!r:.200}, allowed is {-MAX_WEIGHT:g}..{MAX_WEIGHT:g}")
    return AdapterChoice(name, number)


def _tagged(tag: str) -> tuple[str, float]:
    """Name and weight of one tag's text, "name:0.8" and its longer forms."""
    name, *rest = tag.split(":")
    weights = []
    for position, text in enumerate(rest):
        key, equals, value = text.rpartition("=")
        if (equals and key not in ("te", "unet")) or (not equals and position > 1):
            raise _refused(f"<lora:{tag}>: got {text!r}, allowed are a weight, te= and unet=")
        weights.append(_number(name, value))
    if len(set(weights)) > 1:
        raise _refused(f"<lora:{tag}>: got different weights for text and UNet, allowed is one for both")
    return name, weights[0] if weights else 1.0


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _refused(f"{name}: got weight {text!r:.200}, allowed is a number") from None


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest("adapters", reason)
