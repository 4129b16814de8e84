"""CLIP text towers and the conditioning that a UNet gets from them.

The towers are transformers' modules, so that every checkpoint's names and numbers fit, but only the blocks
whose output is used are run. One prompt is encoded alone, one chunk at a time at batch 1: its result cannot
depend on other prompts.

Weights of a prompt follow AUTOMATIC1111's default for every family: each token's state is multiplied by its
weight, then the chunk is scaled so that its mean is what it was; the pooled output stays unweighted. Longer
prompts are chunks encoded one by one and joined along the sequence; pooled is the first chunk's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..adapters.choices import AdapterChoice
from ..config import TextConfig
from ..errors import CheckpointError, InvalidRequest
from ..prompt import MAX_WEIGHT, Chunk, chunk, empty_chunk
from .tokenizer import ClipTokenizer

Choices = tuple[AdapterChoice, ...]
CacheKey = tuple[str, int, Choices]
IGNORED_KEYS = frozenset({"embeddings.position_ids", "logit_scale"})
"""In some checkpoints, without effect: a counter 0..76 (half precision in a few), and CLIP's loss scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What the UNet is conditioned on, for one prompt.

    Attributes:
        context: [L, D] in the towers' dtype; L is positions x chunks, D the sum of the towers' widths.
        pooled: [P], the last tower's projected end-of-text state of the first chunk, or None.
        chunks: how many chunks `context` joins.
    """

    context: Tensor
    pooled: Tensor | None
    chunks: int

    def to(self, like: Tensor) -> Encoded:
        """The same on the device of `like`.

        Raises:
            CheckpointError: it has another dtype: what encoded it is not what the network expects.
        """
        if self.context.dtype != like.dtype:
            raise CheckpointError(f"encoded prompt: got {self.context.dtype}, the model has {like.dtype}")
        pooled = None if self.pooled is None else self.pooled.to(like.device)
        return Encoded(self.context.to(like.device), pooled, self.chunks)


Encode = Callable[[str, int, Choices], Encoded]
"""`TextEncoder.encode` somewhere else; the result may be on any device."""


def hf_config(config: TextConfig) -> CLIPTextConfig:
    """`config` in transformers' terms, also what a diffusers folder stores as `config.json`."""
    return CLIPTextConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        projection_dim=config.projection_dim or config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        pad_token_id=config.pad_id,
        bos_token_id=config.bos_id,
        eos_token_id=config.eos_id,
    )


def build_tower(config: TextConfig) -> nn.Module:
    """A `CLIPTextModel`, or a `CLIPTextModelWithProjection` if `config` has a projection; random weights.

    Under `torch.device("meta")` its parameters are on meta, and its only buffer (positions) is real, so a
    loader that assigns every parameter leaves nothing behind on meta.
    """
    kind = CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection
    build: Any = kind._from_config
    tower: nn.Module = build(hf_config(config), attn_implementation="sdpa").eval()
    _body(tower).embeddings.position_ids = torch.arange(config.positions, device="cpu")[None]
    return tower


def tower_key(name: str, config: TextConfig) -> str | None:
    """The parameter of `build_tower(config)` that the on-disk key `name` fills; None for a key to ignore.

    Keys come with and without `text_model.` (transformers dropped it from `CLIPTextModel` in 5.6 and kept it
    in the class with projection). A projection that the family does not use is ignored. Other unknown names
    come back as they would be stored, for a strict loader to report.
    """
    bare = name.removeprefix("text_model.")
    if bare in IGNORED_KEYS:
        return None
    if bare == "text_projection.weight":
        return bare if config.projection_dim is not None else None
    return bare if config.projection_dim is None else f"text_model.{bare}"


class TextEncoder(nn.Module):
    """The text towers of one model with their tokenizers, and a cache of what they encoded.

    Args:
        configs: one per tower, in the order in which their features are joined.
        tokenizers: one per tower; towers may share one.
        weighting: read weights and BREAK in prompts (`prompt.py`), else take all text literally.
        elsewhere: encodes in place of the towers, which are then not built.
        cache_chunks: bound of the cache, in chunks of all cached prompts together.

    Raises:
        CheckpointError: towers and tokenizers do not fit each other.
    """

    def __init__(
        self,
        configs: Sequence[TextConfig],
        tokenizers: Sequence[ClipTokenizer],
        *,
        weighting: bool = True,
        elsewhere: Encode | None = None,
        cache_chunks: int = 256,
    ) -> None:
        super().__init__()
        _check(configs, tokenizers)
        self.configs = tuple(configs)
        self.tokenizers = tuple(tokenizers)
        self.weighting = weighting
        self.positions = configs[0].positions
        self.context_dim = sum(config.hidden for config in configs)
        self.pooled_dim = configs[-1].projection_dim
        self.towers = nn.ModuleList(build_tower(config) for config in configs if elsewhere is None)
        self.elsewhere = elsewhere
        self._like: Tensor  # is where encoded prompts are, and has their dtype
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)
        self.cache = Cache(cache_chunks)
        self.adapted: Callable[[Choices], AbstractContextManager[object]] = nullcontext
        """Merges adapters into the towers for as long as it lasts; set by who has some (`Adapters`)."""

    def tokenize(self, prompt: str, field: str = "prompt") -> list[tuple[Chunk, ...]]:
        """The chunks of `prompt` per tower, equally many for each; no network is run.

        Raises:
            InvalidRequest: for `field`, the prompt is too long.
        """
        towers = list(zip(self.tokenizers, self.configs, strict=True))
        size, mode = self.positions, self.weighting
        chunks = [
            chunk(tokenizer, prompt, positions=size, pad_id=config.pad_id, weighting=mode, field=field)
            for tokenizer, config in towers
        ]
        most = max(len(own) for own in chunks)
        empty = [empty_chunk(tokenizer, size, config.pad_id) for tokenizer, config in towers]
        return [own + (none,) * (most - len(own)) for own, none in zip(chunks, empty, strict=True)]

    def encode(self, prompt: str, clip_skip: int = 0, adapters: Choices = ()) -> Encoded:
        """The conditioning of one prompt, from the cache if it was encoded before.

        Args:
            clip_skip: blocks left out at the end, counted from the family's own choice of layer.
            adapters: those that change the towers.

        Raises:
            InvalidRequest: the prompt is too long, or a tower has no block left after `clip_skip`.
        """
        key = (prompt, clip_skip, adapters)
        found = self.cache.get(key)
        if found is None:
            if self.elsewhere is not None:
                found = self.elsewhere(prompt, clip_skip, adapters).to(self._like)
            else:
                with self.adapted(adapters):
                    found = self._encode(prompt, clip_skip)
            self.cache.put(key, found)
        return found

    def encode_padded(self, prompt: str, chunks: int, clip_skip: int = 0, adapters: Choices = ()) -> Encoded:
        """`encode`, followed by encoded empty chunks until there are at least `chunks`.

        That makes the positive and the negative prompt equally long; pooled does not change.
        """
        encoded = self.encode(prompt, clip_skip, adapters)
        missing = chunks - encoded.chunks
        if missing <= 0:
            return encoded
        empty = self.encode("", clip_skip, adapters).context
        return Encoded(torch.cat([encoded.context, *[empty] * missing]), encoded.pooled, chunks)

    def zeros(self, chunks: int = 1) -> Encoded:
        """All zeros in the shape of an encoded prompt: SDXL's absent negative prompt."""
        context = self._like.new_zeros(chunks * self.positions, self.context_dim)
        pooled = None if self.pooled_dim is None else self._like.new_zeros(self.pooled_dim)
        return Encoded(context, pooled, chunks)

    def forward(
        self, ids: Tensor, weights: Tensor | None = None, clip_skip: int = 0, pool: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The towers' states for B chunks: context [B, positions, D] and pooled [B, P] or None.

        Args:
            ids: [towers, B, positions] token ids, every row with its end of text.
            weights: [towers, B, positions] token weights, or None for all 1.
            pool: False skips the blocks that only the pooled output needs.
        """
        contexts: list[Tensor] = []
        pooled: Tensor | None = None
        for index, (tower, config) in enumerate(zip(self.towers, self.configs, strict=True)):
            last = index == len(self.configs) - 1
            state, pooled = _run(tower, config, ids[index], clip_skip, pool and last)
            contexts.append(state if weights is None else emphasise(state, weights[index]))
        return torch.cat(contexts, dim=-1), pooled

    @torch.no_grad()
    def _encode(self, prompt: str, clip_skip: int) -> Encoded:
        device = self._like.device
        contexts: list[Tensor] = []
        pooled: Tensor | None = None
        per_chunk = list(zip(*self.tokenize(prompt), strict=True))  # one tuple of the towers' chunks each
        for index, towers in enumerate(per_chunk):
            ids = torch.tensor([own.ids for own in towers], device=device)[:, None]
            weights = None
            if any(own.weighted for own in towers):
                weights = torch.tensor([own.weights for own in towers], device=device)[:, None]
            context, first = self(ids, weights, clip_skip, pool=index == 0)
            contexts.append(context[0])
            if first is not None:
                pooled = first[0]
        return Encoded(torch.cat(contexts), pooled, len(contexts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move to another device or dtype comes through here, and outdates what is cached."""
        self.cache.clear()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


class Cache:
    """Least recently used encoded prompts, at most `limit` chunks together. Safe to share between threads.

    Must be cleared when the towers' weights change in place; adapters are in its keys. Copies and pickles of it
    are empty.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[CacheKey, Encoded] = OrderedDict()
        self._chunks = 0
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        return type(self), (self.limit,)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey) -> Encoded | None:
        """What was put under `key` (prompt, clip_skip, adapters), if it is still there."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: CacheKey, encoded: Encoded) -> None:
        """Keeps `encoded`, and drops the entries not used for longest if they no longer fit."""
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = encoded
            self._chunks += encoded.chunks
            while self._chunks > self.limit:
                self._chunks -= self._entries.popitem(last=False)[1].chunks

    def clear(self) -> None:
        """Forgets all entries; the counters go on."""
        with self._lock:
            self._entries.clear()
            self._chunks = 0


def emphasise(states: Tensor, weights: Tensor) -> Tensor:
    """`states` [B, L, D] times `weights` [B, L], each chunk scaled back to its mean; computed in float32.

    The mean of a chunk may cross zero, so the scale is held in 1/10..10, which is where it lies whenever all
    states pull the mean the same way, since weights lie in -10..10. Weights of 1 return `states` exactly.
    """
    before = states.float()
    after = before * weights.float()[..., None]
    scale = before.mean(dim=(1, 2), keepdim=True) / after.mean(dim=(1, 2), keepdim=True)
    scale = scale.nan_to_num(nan=1.0).clamp(1 / MAX_WEIGHT, MAX_WEIGHT)
    return (after * scale).to(states.dtype)


def _run(
    tower: Any, config: TextConfig, ids: Tensor, clip_skip: int, pool: bool
) -> tuple[Tensor, Tensor | None]:
    """One tower's context state [B, L, H] and, if asked for and available, projected pooled [B, P]."""
    used = config.layers - config.layer - clip_skip
    if clip_skip < 0 or used < 1:
        most = config.layers - config.layer - 1
        raise InvalidRequest("clip_skip", f"got {clip_skip}, this model allows 0..{most}")
    pool = pool and config.projection_dim is not None
    body = _body(tower)
    state = body.embeddings(input_ids=ids)  # [B, L, H]
    context = state
    for number, block in enumerate(body.encoder.layers[: config.layers if pool else used], start=1):
        state = block(state, None, is_causal=True)
        context = state if number == used else context
    pooled = None
    if pool:
        # The first end of text: padding may repeat its id, and learned tokens may have larger ids.
        end = (ids == config.eos_id).int().argmax(dim=-1)
        rows = torch.arange(len(ids), device=ids.device)
        pooled = tower.text_projection(body.final_layer_norm(state[rows, end]))
    return body.final_layer_norm(context) if config.final_norm else context, pooled


def _body(tower: nn.Module) -> Any:
    """The part of a tower that has the blocks: the tower itself, or `text_model` beside a projection."""
    return getattr(tower, "text_model", tower)


def _check(configs: Sequence[TextConfig], tokenizers: Sequence[ClipTokenizer]) -> None:
    if not configs or len(configs) != len(tokenizers):
        raise CheckpointError(f"text: got {len(configs)} towers and {len(tokenizers)} tokenizers")
    for index, (config, tokenizer) in enumerate(zip(configs, tokenizers, strict=True)):
        where, rows = f"text tower {index}", f"the embedding has {config.vocab} rows"
        if config.positions != configs[0].positions:
            raise CheckpointError(f"{where}: got {config.positions} positions, not {configs[0].positions}")
        if tokenizer.vocab_size > config.vocab:
            raise CheckpointError(f"{where}: got a tokenizer of {tokenizer.vocab_size} ids, {rows}")
        if not 0 <= config.pad_id < config.vocab:
            raise CheckpointError(f"{where}: got pad id {config.pad_id}, {rows}")
        ids, wanted = (tokenizer.bos_id, tokenizer.eos_id), (config.bos_id, config.eos_id)
        if ids != wanted:
            raise CheckpointError(
                f"{where}: begin and end ids of the tokenizer are {ids}, of the tower {wanted}"
            )
