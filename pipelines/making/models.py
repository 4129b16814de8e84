"""Where a job's model comes from: the one place where `pipelines` opens `diffray.model`'s engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import ModelOptions, storage_options

if TYPE_CHECKING:
    from diffray.model import Engine
    from diffray.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class OpenModel:
    """An engine that runs, and the facts that decide its pictures' bytes."""

    engine: Engine
    name: str
    checksum: str
    device: str
    """The kind of device: "cpu" or "cuda"."""
    dtype: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Checksums of its adapters by name."""

    def facts(self) -> dict[str, Any]:
        """What every worker of one job must agree on."""
        own = {
            "checksum": self.checksum,
            "device": self.device,
            "dtype": self.dtype,
            "rows": self.engine.rows,
        }
        return own | ({"adapters": dict(self.adapters)} if self.adapters else {})

    @property
    def ticks(self) -> int:
        """Steps that the engine has begun so far."""
        return self.engine.ticks

    @property
    def broken(self) -> BaseException | None:
        """What stopped the engine for good, if something did: then no image's error is its own."""
        return self.engine.failure


class Models:
    """Opens models. Sent to the workers as it is, so it holds no model itself.

    Args:
        storage: fsspec options by protocol or URL prefix, for models that are URLs.
    """

    def __init__(self, storage: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._storage = dict(storage or {})

    def config(self, options: ModelOptions) -> ModelConfig:
        """What the model is, from its headers alone."""
        from diffray.model import model_config

        return model_config(self._local(options.source), **self._arguments(options))

    def identity(self, options: ModelOptions) -> dict[str, Any]:
        """What decides a model's pictures, for the job's fingerprint: checksums of its files and of its adapters'."""
        from diffray.model.adapters.adapter import adapter_checksums

        own: dict[str, Any] = {"checksum": self.checksum(options)}
        adapters = adapter_checksums(self._adapters(options))
        return own | ({"adapters": adapters} if adapters else {})

    def checksum(self, options: ModelOptions) -> str:
        """SHA-256 of the model's files, without loading them."""
        from diffray.model.weights.checkpoint import open_checkpoint
        from diffray.model.weights.source import resolve

        return open_checkpoint(resolve(self._local(options.source))).checksum()

    def fetch(self, options: ModelOptions) -> None:
        """Bring the model's files to this machine, if they are not here yet; its processes share them."""
        from diffray.model.weights.source import resolve

        resolve(self._local(options.source))
        for source in self._adapters(options).values():
            resolve(source)

    def open(self, options: ModelOptions) -> OpenModel:
        """Load the weights and start an engine."""
        from diffray.model import Engine, load_model

        source, arguments = self._local(options.source), self._arguments(options)
        model = load_model(source, device=options.device, dtype=options.dtype, **arguments)
        engine = Engine(model, batch_size=options.batch_size)
        engine.start()
        device, dtype = str(model.device).partition(":")[0], str(model.dtype).removeprefix("torch.")
        adapters = model.adapters.checksums()
        return OpenModel(engine, shown_name(options.source), model.checksum, device, dtype, adapters)

    def _local(self, source: str) -> str:
        """The source, or where it was fetched to if it is a URL."""
        from diffray.model.weights.source import resolve

        return str(resolve(source, storage_options(self._storage, source))) if "://" in source else source

    def _adapters(self, options: ModelOptions) -> dict[str, str]:
        return {name: self._local(source) for name, source in options.adapters.items()}

    def _arguments(self, options: ModelOptions) -> dict[str, Any]:
        own = {k: self._local(v) if isinstance(v, str) else v for k, v in options.options.items()}
        return own | ({"adapters": self._adapters(options)} if options.adapters else {})


def shown_name(source: str) -> str:
    """A model's name for datasets that travel: of a path or URL only the last part."""
    local = "://" in source or os.path.exists(os.path.expanduser(source))
    return os.path.basename(source.rstrip("/")) if local else source
