"""What is refused for what a prompt says or a picture shows. The answer is a refusal, never a black picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from PIL import Image

from diffray.model import ImageRequest
from diffray.model.judges.checks import PromptFilter

from .config import Guardrails, InvalidConfig
from .refusal import Refusal

PromptHook = Callable[[ImageRequest], str | None]
ImageHook = Callable[[Image.Image, ImageRequest], str | None]


class Guards:
    """The hooks of a config, imported.

    Raises:
        InvalidConfig: a hook cannot be imported, or the block-list cannot be read.
    """

    def __init__(self, config: Guardrails) -> None:
        self._filter = None if config.blocklist is None else _block_list(config.blocklist)
        self._prompt: Sequence[PromptHook] = [_hook(path) for path in config.prompt]
        self._image: Sequence[ImageHook] = [_hook(path) for path in config.image]

    @property
    def images(self) -> bool:
        """Whether pictures are checked; then nobody sees one unfinished."""
        return bool(self._image)

    async def check_prompts(self, requests: Sequence[ImageRequest]) -> None:
        """Checks each prompt once, in a thread: a long one takes milliseconds.

        Raises:
            Refusal: "content_filtered".
        """
        if self._filter is not None or self._prompt:
            distinct = {(request.prompt, request.negative_prompt): request for request in requests}
            for request in distinct.values():
                await asyncio.to_thread(self._check_prompt, request)

    def _check_prompt(self, request: ImageRequest) -> None:
        if self._filter is not None and self._filter.match(request.prompt) is not None:
            raise _refusal("the prompt has a word that this service does not allow", "prompt")
        for hook in self._prompt:
            if reason := hook(request):
                raise _refusal(reason, "prompt")

    def check_image(self, image: Image.Image, request: ImageRequest) -> None:
        """Raises:
        Refusal: "content_filtered".
        """
        for hook in self._image:
            if reason := hook(image, request):
                raise _refusal(reason, None)


def _refusal(reason: str, field: str | None) -> Refusal:
    return Refusal(400, "content_filtered", reason, field=field)


def _block_list(path: str) -> PromptFilter:
    try:
        return PromptFilter.from_file(path)
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"guardrails.blocklist: {error}") from None


def _hook(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        hook = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidConfig(f"guardrails: {path}: {error}") from None
    if not callable(hook):
        raise InvalidConfig(f"guardrails: {path} is not callable")
    return hook
