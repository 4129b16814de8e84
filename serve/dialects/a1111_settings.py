"""Options of AUTOMATIC1111's API: what a client has set, by POST /options or for one request.

Every client has its own; only what has an effect here can be changed, and the rest is refused by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffray.model import InvalidRequest

from ..work import ModelCard

FORMATS: dict[str, Literal["png", "jpeg", "webp"]] = {
    "png": "png",
    "jpg": "jpeg",
    "jpeg": "jpeg",
    "webp": "webp",
}
FIXED: dict[str, Any] = {
    "sd_vae": "Automatic",
    "randn_source": "CPU",
    "eta_noise_seed_delta": 0,
    "emphasis": "Original",
    "comma_padding_backtrack": 20,
    "enable_pnginfo": True,
    "do_not_add_watermark": False,
    "live_previews_enable": True,
    "return_grid": False,
    "samples_save": False,
    "grid_save": False,
}
"""Options that have one value; clients may send it back."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a client has set.

    Attributes:
        model: a name of the service's; None is its default.
        clip_stop: the text layer, from the end, that is used; 1 is the family's own choice.
        format, quality: of the pictures' files.
    """

    model: str | None = None
    clip_stop: int = 1
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 80

    def changed(self, options: Mapping[str, Any], cards: list[ModelCard]) -> Settings:
        """These settings after some options are set.

        Raises:
            InvalidRequest: an option that is not known, or a value that is not allowed.
        """
        settings = self
        for name, value in options.items():
            if name == "sd_model_checkpoint":
                settings = replace(settings, model=model_name(value, cards))
            elif name == "CLIP_stop_at_last_layers":
                settings = replace(settings, clip_stop=_integer(name, value, 1, 12))
            elif name == "samples_format":
                if str(value).lower() not in FORMATS:
                    raise InvalidRequest(name, f"got {value!r}, allowed is one of {', '.join(FORMATS)}")
                settings = replace(settings, format=FORMATS[str(value).lower()])
            elif name == "jpeg_quality":
                settings = replace(settings, quality=_integer(name, value, 1, 100))
            elif name == "sd_checkpoint_hash":
                _same(name, value, [card.checksum for card in cards])
            elif name in FIXED:
                _same(name, value, [FIXED[name], *([None, "None"] if name == "sd_vae" else [])])
            else:
                raise InvalidRequest(name, f"no such option here; there are {', '.join(shown(self, cards))}")
        return settings


class Kept:
    """The settings of clients, of those that set some most recently."""

    def __init__(self, clients: int = 10_000) -> None:
        self._most = clients
        self._settings: OrderedDict[str, Settings] = OrderedDict()

    def of(self, client: str) -> Settings:
        """A client's settings."""
        return self._settings.get(client, Settings())

    def keep(self, client: str, settings: Settings) -> None:
        """From now on these."""
        self._settings[client] = settings
        self._settings.move_to_end(client)
        if len(self._settings) > self._most:
            self._settings.popitem(last=False)


def shown(settings: Settings, cards: list[ModelCard]) -> dict[str, Any]:
    """All options and their values, as GET /options has them."""
    card = next((card for card in cards if card.name == settings.model), cards[0])
    return {
        "sd_model_checkpoint": title(card),
        "sd_checkpoint_hash": card.checksum,
        "CLIP_stop_at_last_layers": settings.clip_stop,
        "samples_format": settings.format,
        "jpeg_quality": settings.quality,
        **FIXED,
    }


def title(card: ModelCard) -> str:
    """A model as lists show it: name and short hash, if the file has been read already."""
    return f"{card.name} [{card.checksum[:10]}]" if card.checksum else card.name


def model_name(value: object, cards: list[ModelCard]) -> str:
    """The model that a title, name or hash means.

    Raises:
        InvalidRequest: none.
    """
    text = value if isinstance(value, str) else ""
    name = text.rpartition(" [")[0] if text.endswith("]") else text
    for card in cards:
        hashed = card.checksum and len(text) >= 8 and card.checksum.startswith(text)
        if card.name in (text, name) or hashed:
            return card.name
    names = ", ".join(card.name for card in cards)
    raise InvalidRequest("sd_model_checkpoint", f"got {value!r}, allowed is one of {names}")


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"got {value!r}, allowed is {low}..{high}")
    return value


def _same(name: str, value: object, allowed: list[Any]) -> None:
    if value not in allowed:
        raise InvalidRequest(name, f"got {value!r}, this service has only {allowed[0]!r}")
