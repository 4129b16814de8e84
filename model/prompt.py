"""From a prompt to chunks of token ids with one weight per token.

The syntax is AUTOMATIC1111's: `(word)` weighs 1.1, `(word:1.3)` weighs 1.3, `[word]` weighs 1/1.1; nesting
multiplies; `\\(`, `\\)`, `\\[`, `\\]` and `\\\\` are the plain character; a bracket that is never closed
reaches to the end, one that was never opened is text; `BREAK` starts a new chunk. Text of equal weight is
joined over brackets, so that only a change of weight splits a word.

A prompt longer than the text tower becomes several chunks, each with its own begin and end of text. If a
chunk would be cut less than 20 tokens after a comma, it is cut at that comma instead, again as AUTOMATIC1111
does by default. All of this depends on the prompt alone, never on other prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from .errors import InvalidRequest
from .networks.tokenizer import ClipTokenizer

BREAK = "BREAK"
ROUND = 1.1
SQUARE = 1 / 1.1
MAX_WEIGHT = 10.0
"""Weights are clamped to -10..10: finite whatever the nesting, and far beyond any useful emphasis."""
MAX_CHUNKS = 32
COMMA_BACKTRACK = 20

# Possessive quantifiers keep the search linear on hostile text.
_SYNTAX = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    rf"|\b{BREAK}\b"
    r"|:\s*+(?P<weight>[+-]?(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++))\s*+\)"
    r"|[()\[\]]"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has one weight."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One pass of a text tower: `positions` ids (begin, text, end, padding) and their weights.

    Begin, end and padding always weigh 1.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """Some token does not weigh 1."""
        return any(weight != 1.0 for weight in self.weights)


def parse(text: str) -> list[list[Piece]]:
    """The sections of a prompt between its BREAKs, each a list of pieces, empty for no text. Never raises."""
    matches = list(_SYNTAX.finditer(text))
    factors = _round_factors(matches)
    sections: list[list[Piece]] = [[]]
    stack = [1.0]  # the weight inside each open round bracket; those nest properly among themselves
    squares = 0  # open square brackets: a count, because they may interleave with round ones
    end = 0
    for index, match in enumerate(matches):
        symbol, literal = match.group(), ""
        weight = stack[-1] * SQUARE**squares
        if symbol == "(":
            stack.append(_clamp(stack[-1] * factors[index]))
        elif symbol == "[":
            squares += 1
        elif _closes_round(match) and len(stack) > 1:
            stack.pop()
        elif symbol == "]" and squares:
            squares -= 1
        elif symbol != BREAK:
            literal = match["escaped"] or symbol
        sections[-1].append(Piece(text[end : match.start()] + literal, weight))
        end = match.end()
        if symbol == BREAK:
            sections.append([])
    sections[-1].append(Piece(text[end:], stack[-1] * SQUARE**squares))
    return [_joined(section) for section in sections]


def chunk(
    tokenizer: ClipTokenizer,
    text: str,
    *,
    positions: int = 77,
    pad_id: int | None = None,
    weighting: bool = True,
    field: str = "prompt",
) -> tuple[Chunk, ...]:
    """The chunks of a prompt, at least one; without syntax in `text` its first is CLIP's plain tokenisation.

    Args:
        positions: ids per chunk, two of which are begin and end of text.
        pad_id: fills a chunk after its end of text; None is the end-of-text id itself.
        weighting: False takes brackets, backslashes and BREAK literally.
        field: the request field that an error names.

    Raises:
        InvalidRequest: the prompt needs more than `MAX_CHUNKS` chunks.
    """
    comma = tokenizer.vocab.get(",</w>")
    pad = tokenizer.eos_id if pad_id is None else pad_id
    chunks: list[Chunk] = []
    for section in parse(text) if weighting else [[Piece(text, 1.0)]]:
        tokens = [(i, piece.weight) for piece in section for i in tokenizer.encode(piece.text)]
        for part in _split(tokens, positions - 2, comma):
            padding = positions - 2 - len(part)
            ids = (tokenizer.bos_id, *(i for i, _ in part), tokenizer.eos_id, *[pad] * padding)
            chunks.append(Chunk(ids, (1.0, *(weight for _, weight in part), 1.0, *[1.0] * padding)))
    if len(chunks) > 1 and not tokens:
        chunks.pop()  # nothing follows the last BREAK
    if len(chunks) > MAX_CHUNKS:
        allowed = f"allowed are {MAX_CHUNKS} of {positions - 2} tokens"
        raise InvalidRequest(field, f"got text for {len(chunks)} chunks, {allowed}")
    return tuple(chunks)


def empty_chunk(tokenizer: ClipTokenizer, positions: int, pad_id: int) -> Chunk:
    """The chunk of an empty prompt."""
    return chunk(tokenizer, "", positions=positions, pad_id=pad_id)[0]


def _split(tokens: list[tuple[int, float]], size: int, comma: int | None) -> list[list[tuple[int, float]]]:
    """`tokens` in parts of at most `size`; one empty part for none."""
    parts, start = [], 0
    while len(tokens) - start > size:
        end = start + size
        if tokens[end][0] != comma:
            nearby = range(end - 1, max(start, end - COMMA_BACKTRACK) - 1, -1)
            end = next((i + 1 for i in nearby if tokens[i][0] == comma), end)
        parts.append(tokens[start:end])
        start = end
    return [*parts, tokens[start:]]


def _round_factors(matches: list[re.Match[str]]) -> dict[int, float]:
    """Each round bracket's factor, by the index of its opening match: 1.1 unless closed by `:weight)`."""
    factors: dict[int, float] = {}
    opened: list[int] = []
    for index, match in enumerate(matches):
        if match.group() == "(":
            factors[index] = ROUND
            opened.append(index)
        elif _closes_round(match) and opened:
            start = opened.pop()
            if match["weight"]:
                factors[start] = _clamp(float(match["weight"]))
    return factors


def _closes_round(match: re.Match[str]) -> bool:
    return match.group() == ")" or match["weight"] is not None


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of equal weight as one piece, without empty ones."""
    texts = [piece for piece in pieces if piece.text]
    runs = groupby(texts, key=lambda piece: piece.weight)
    return [Piece("".join(piece.text for piece in run), weight) for weight, run in runs]


def _clamp(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))
