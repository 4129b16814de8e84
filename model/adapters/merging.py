"""The adapters of a loaded model, and the weights that they are merged into.

    W = W0 + sum of (adapter weight * its change of W0), in float32, rounded once to the network's type

W0 is kept for the tensors that the merged adapters touch, and for those alone. Another set is always merged from
W0, in the order of names: so the bytes of an image do not depend on what was merged before, and without adapters
the weights are the checkpoint's, bit for bit. Weights are written in place: the network, compiled or not, knows
nothing of it, and a step costs what it costs without adapters.

The UNet and the text encoders are merged apart, each with the adapters that change it, when it is about to run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor, nn

from ..networks.text import TextEncoder, tower_key
from ..networks.unet import UNet
from ..weights.keys import packing, text_shapes
from .adapter import Adapter, AdapterInfo, Loaded
from .choices import AdapterChoice, check_known
from .names import Place

Choices = tuple[AdapterChoice, ...]

FACTOR_BYTES = 2 * 2**30
"""Memory for the factors of the adapters used last; those of others are read again."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Where a folder tensor is in a network: rows of a parameter, for projections may be packed."""

    network: nn.Module
    parameter: str
    rows: slice

    def view(self) -> Tensor:
        """The tensor itself."""
        return self.network.get_parameter(self.parameter).data[self.rows]


Targets = Mapping[tuple[str, str], Target]
"""By part and folder tensor name."""


class Merged:
    """The weights of one network, and the adapters that are merged into them.

    Attributes:
        choices: what is merged now.
    """

    def __init__(self, targets: Targets) -> None:
        self.choices: Choices = ()
        self._targets = targets
        self._base: dict[tuple[str, str], Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of the kept base weights, on the network's device."""
        return sum(tensor.nbytes for tensor in list(self._base.values()))

    def changes(self, adapter: Adapter) -> bool:
        """Whether an adapter has something for this network."""
        return any((place.part, f"{place.module}.weight") in self._targets for place in adapter.changes)

    @torch.inference_mode()
    def become(self, choices: Choices, loaded: Mapping[str, Mapping[Place, Loaded]]) -> None:
        """Merge these and nothing else. When that fails, nothing is merged: the base weights are back."""
        wanted: dict[tuple[str, str], list[tuple[float, Loaded]]] = {}
        for name, weight in choices:
            for place, change in loaded[name].items():
                for tensor in change.tensors(place.module):
                    if (place.part, tensor) in self._targets:
                        wanted.setdefault((place.part, tensor), []).append((weight, change))
        try:
            for key in self._base.keys() - wanted.keys():
                self._targets[key].view().copy_(self._base.pop(key))
            for key, changes in wanted.items():
                self._merge(key, changes)
        except BaseException:
            self.restore()
            raise
        self.choices = choices

    @torch.inference_mode()
    def restore(self) -> None:
        """The base weights, bit for bit."""
        for key, base in self._base.items():
            self._targets[key].view().copy_(base)
        self._base.clear()
        self.choices = ()

    def _merge(self, key: tuple[str, str], changes: Iterable[tuple[float, Loaded]]) -> None:
        view = self._targets[key].view()
        if key not in self._base:
            self._base[key] = view.clone()
        base = self._base[key].float()
        total = base.clone()
        for weight, change in changes:
            total.add_(change.of(key[1], base), alpha=weight)
        view.copy_(total)


class Adapters:
    """The adapters that `load_model` was given, merged into the model's weights as images ask for them.

    Thread safe, and safe with several engines on one model: who uses a network in here has it alone.

    Attributes:
        names: of all adapters, sorted.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter] | None = None,
        unet: UNet | None = None,
        text: TextEncoder | None = None,
        towers: Iterable[str] = (),
        *,
        factor_bytes: int = FACTOR_BYTES,
    ) -> None:
        """
        Args:
            unet, text: the model's networks.
            towers: the part names of the text encoders.
            factor_bytes: bound of the factors that are kept in memory.
        """
        self._adapters = dict(adapters or {})
        self.names = tuple(sorted(self._adapters))
        self._unet = Merged({} if unet is None else _unet_targets(unet))
        self._text = Merged({} if text is None else _text_targets(text, towers))
        self._limit = factor_bytes
        self._factors: OrderedDict[str, dict[Place, Loaded]] = OrderedDict()
        self._lock = RLock()
        if text is not None and self.names:
            text.adapted = self._in_text

    def check(self, choices: Iterable[AdapterChoice]) -> None:
        """Raises InvalidRequest for "adapters" when one is not among `names`."""
        check_known(choices, self.names)

    def checksums(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """sha256 of the files of these adapters, or of all, by name; each computed on first use.

        Raises:
            CheckpointError: a file was replaced since.
        """
        return {name: self._adapters[name].checksum for name in (self.names if names is None else names)}

    def info(self, name: str) -> AdapterInfo:
        """What there is to say about one of `names`."""
        return self._adapters[name].info

    @property
    def bytes(self) -> int:
        """Memory held now: factors, and base weights beside merged ones."""
        factors = sum(change.bytes for loaded in list(self._factors.values()) for change in loaded.values())
        return factors + self._unet.bytes + self._text.bytes

    def load(self, choices: Iterable[AdapterChoice]) -> None:
        """Read what the choices need, so that what is wrong with a file shows before a network call.

        Raises:
            CheckpointError: a value is not finite, or a file was replaced.
        """
        with self._lock:
            for choice in choices:
                self._loaded(choice.name)

    def of_unet(self, choices: Choices) -> Choices:
        """Those that change the UNet: images of equal ones can share a network call."""
        return self._of(self._unet, choices)

    def of_text(self, choices: Choices) -> Choices:
        """Those that change the text encoders."""
        return self._of(self._text, choices)

    @property
    def in_unet_now(self) -> Choices:
        """What the UNet is merged with."""
        return self._unet.choices

    @contextmanager
    def in_unet(self, choices: Choices) -> Iterator[None]:
        """The UNet with `choices` (of `of_unet`) merged, until this ends; then it stays as it is until asked
        for otherwise."""
        with self._using(self._unet, choices):
            yield

    def restore(self) -> None:
        """The checkpoint's own weights everywhere; the next image merges what it needs again."""
        with self._lock:
            self._unet.restore()
            self._text.restore()

    @contextmanager
    def _in_text(self, choices: Choices) -> Iterator[None]:
        with self._using(self._text, choices):
            yield

    @contextmanager
    def _using(self, network: Merged, choices: Choices) -> Iterator[None]:
        if not self.names:
            yield
            return
        with self._lock:
            if network.choices != choices:
                network.become(choices, {name: self._loaded(name) for name, _ in choices})
            yield

    def _of(self, network: Merged, choices: Choices) -> Choices:
        return tuple(choice for choice in choices if network.changes(self._adapters[choice.name]))

    def _loaded(self, name: str) -> dict[Place, Loaded]:
        """An adapter's factors, from memory if it was used lately."""
        loaded = self._factors.get(name)
        if loaded is None:
            loaded = self._factors[name] = self._adapters[name].read()
        self._factors.move_to_end(name)
        held = {own: sum(change.bytes for change in one.values()) for own, one in self._factors.items()}
        for own in list(self._factors)[:-1]:
            if sum(held.values()) <= self._limit:
                break
            del self._factors[own], held[own]
        return loaded


def _unet_targets(unet: UNet) -> dict[tuple[str, str], Target]:
    targets = {}
    for parameter, tensor in unet.named_parameters():
        parts = packing(parameter)
        size = tensor.shape[0] // len(parts)
        for index, name in enumerate(parts):
            targets["unet", name] = Target(unet, parameter, slice(index * size, (index + 1) * size))
    return targets


def _text_targets(text: TextEncoder, towers: Iterable[str]) -> dict[tuple[str, str], Target]:
    targets = {}
    # Where towers are elsewhere, the names alone count: they tell which adapters change the text (`of_text`).
    modules = text.towers or [text] * len(text.configs)
    for part, config, tower in zip(towers, text.configs, modules, strict=True):
        for name, shape in text_shapes(config).items():
            parameter = tower_key(name, config)
            if parameter is not None:
                targets[part, name] = Target(tower, parameter, slice(shape[0]))
    return targets
