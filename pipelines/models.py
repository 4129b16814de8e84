"""Where a job's model comes from: the one place where `pipelines` opens `diffray.model`'s engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .config import storage_options
from .options import ModelOptions

if TYPE_CHECKING:
    from diffray.model import Engine
    from diffray.model.config import ModelConfig
    from diffray.model.networks.text import Encode, Encoded
    from diffray.model.weights.load import Model
    from diffray.model.weights.texts import Texts


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What decides an encoded prompt's bytes.

    Attributes:
        checksum: of the model's files.
        adapters: name and checksum of each.
        threads: on CPU, where the last bits may depend on them.
    """

    checksum: str
    adapters: tuple[tuple[str, str], ...]
    device: str
    dtype: str
    threads: int | None

    @classmethod
    def of(cls, model: Model | Texts) -> TextFacts:
        """Those of a loaded model, in this process."""
        import torch

        device, dtype = _kind(model)
        adapters = tuple(model.adapters.checksums().items())
        threads = torch.get_num_threads() if device == "cpu" else None
        return cls(model.checksum, adapters, device, dtype, threads)


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
    prompts: Callable[[], Mapping[str, int]] = dict
    """How many prompts were "encoded" so far, and "shared" with other engines."""
    texts: TextFacts | None = None
    """What its own text encoder is, or would be if its prompts were not encoded elsewhere."""
    vae: str | None = None
    """Checksum of an autoencoder that it has instead of its files' own."""

    def facts(self) -> dict[str, Any]:
        """What every worker of one job must agree on."""
        own = {
            "checksum": self.checksum,
            "device": self.device,
            "dtype": self.dtype,
            "rows": self.engine.rows,
        }
        own |= {"vae": self.vae} if self.vae else {}
        return own | ({"adapters": dict(self.adapters)} if self.adapters else {})

    @property
    def ticks(self) -> int:
        """Steps that the engine has begun so far."""
        return self.engine.ticks

    @property
    def broken(self) -> BaseException | None:
        """What stopped the engine for good, if something did: then no image's error is its own."""
        return self.engine.failure


class OpenTexts:
    """Text encoders that run, without the rest of their model. Used by one thread.

    Args:
        memory: bytes of encoded prompts to keep.
    """

    def __init__(self, texts: Texts, memory: int) -> None:
        self._texts, self.facts = texts, TextFacts.of(texts)
        self._cache = texts.encoder.cache
        self._cache.limit = max(1, memory // texts.encoder.zeros().context.nbytes)

    @property
    def runs(self) -> int:
        """Prompts for which the towers ran, the others were remembered."""
        return self._cache.misses

    def encode(self, prompt: str, clip_skip: int, adapters: tuple[Any, ...]) -> Encoded:
        """See `Texts.encode`."""
        return self._texts.encode(prompt, clip_skip, adapters)


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
        """What decides a model's pictures, for the job's fingerprint: checksums of its files, of an autoencoder's that
        is not among them, and of its adapters'."""
        from diffray.model.adapters.adapter import adapter_checksums

        own: dict[str, Any] = {"checksum": self.checksum(options)}
        own |= {"vae": vae} if (vae := self._vae(options)) else {}
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

    def open(self, options: ModelOptions, text: Encode | None = None) -> OpenModel:
        """Load the weights and start an engine.

        Args:
            text: encodes the prompts; the model's text encoders are then not loaded.
        """
        from diffray.model import Engine, load_model

        source, arguments = self._local(options.source), self._arguments(options)
        model = load_model(source, device=options.device, dtype=options.dtype, text=text, **arguments)
        engine = Engine(model, batch_size=options.batch_size)
        engine.start()
        adapters = model.adapters.checksums()
        name, cache = shown_name(options.source), model.text.cache
        counts: Callable[[], Mapping[str, int]] = lambda: {"encoded": cache.misses}  # noqa: E731
        texts, vae = TextFacts.of(model), self._vae(options)
        return OpenModel(engine, name, model.checksum, *_kind(model), adapters, counts, texts, vae)

    def open_texts(self, options: ModelOptions, memory: int) -> OpenTexts:
        """Load the text encoders alone, which keep so many bytes of what they encoded."""
        from diffray.model.weights.texts import load_texts

        source, arguments = self._local(options.source), self._arguments(options)
        return OpenTexts(load_texts(source, device=options.device, dtype=options.dtype, **arguments), memory)

    def _local(self, source: str) -> str:
        """The source, or where it was fetched to if it is a URL."""
        from diffray.model.weights.source import resolve

        return str(resolve(source, storage_options(self._storage, source))) if "://" in source else source

    def _vae(self, options: ModelOptions) -> str | None:
        from diffray.model.weights.load import vae_checksum

        source = options.options.get("vae")
        return vae_checksum(self._local(source)) if source else None

    def _adapters(self, options: ModelOptions) -> dict[str, str]:
        return {name: self._local(source) for name, source in options.adapters.items()}

    def _arguments(self, options: ModelOptions) -> dict[str, Any]:
        own = {k: self._local(v) if isinstance(v, str) else v for k, v in options.options.items()}
        return own | ({"adapters": self._adapters(options)} if options.adapters else {})


def _kind(model: Model | Texts) -> tuple[str, str]:
    """Kind of device, and type."""
    return str(model.device).partition(":")[0], str(model.dtype).removeprefix("torch.")


def shown_name(source: str) -> str:
    """A model's name for datasets that travel: of a path or URL only the last part."""
    local = "://" in source or os.path.exists(os.path.expanduser(source))
    return os.path.basename(source.rstrip("/")) if local else source
