"""CLIP's byte-pair encoding, from OpenAI's merges table in this package or from a checkpoint's own files.

Text is cleaned as `transformers.CLIPTokenizer` does (NFC, runs of whitespace to one space, lower case), which
is what most people's saved seeds were made with; OpenAI's own code also repaired encodings (ftfy) and
unescaped HTML. In two points this tokenizer is stricter than transformers: a literal `<|endoftext|>` in a
prompt is plain text and never the special id, and `!` is always the word `!</w>` (256 in OpenAI's table),
also for SD2 and SDXL, whose pad token is `!` (0).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from ..errors import CheckpointError

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's word pattern, without the special tokens that the original lets a prompt inject."""

MAX_ID = 2**31  # what the Rust side can hold
OPENAI_MERGES = 49152 - 256 - 2
"""The table holds 262144 merges; CLIP uses the first that, with 2 x 256 bytes and 2 specials, make 49408."""


class ClipTokenizer:
    """Text to CLIP token ids, one vocabulary. Immutable; safe to share between threads and to pickle.

    Attributes:
        vocab: token string to id, the two special tokens included.
        bos_id, eos_id: ids of the special tokens; `encode` returns neither.
        vocab_size: one more than the largest id, so at most the rows of the embedding.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], bos: str = BOS, eos: str = EOS
    ) -> None:
        for token, i in vocab.items():
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_ID:
                raise CheckpointError(f"tokenizer: {token!r} has the id {i!r}, allowed is 0..{MAX_ID - 1}")
        if len(set(vocab.values())) != len(vocab):
            raise CheckpointError("tokenizer: two vocabulary entries have the same id")
        for special in (bos, eos):
            if special not in vocab:
                raise CheckpointError(f"tokenizer: the special token {special!r} is not in the vocabulary")
        self.vocab = dict(vocab)
        self.bos_id, self.eos_id = vocab[bos], vocab[eos]
        self.vocab_size = max(vocab.values()) + 1
        self._merges = list(merges)
        self._bos, self._eos = bos, eos
        # Without the special tokens no text can reach their ids, and without an unknown token a byte that a
        # small vocabulary lacks is dropped (transformers writes end-of-text there, which moves the pooling).
        words = {token: i for token, i in vocab.items() if token not in (bos, eos)}
        for a, b in self._merges:  # checked here, because the Rust side panics on some bad tables
            if not (a in words and b in words and a + b in words):
                raise CheckpointError(f"tokenizer: the merge {a!r} {b!r} does not fit the vocabulary")
        self._tokenizer = Tokenizer(BPE(vocab=words, merges=self._merges, end_of_word_suffix=END_OF_WORD))
        self._tokenizer.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
        split = Split(Regex(WORDS), behavior="removed", invert=True)
        self._tokenizer.pre_tokenizer = PreTokenizers([split, ByteLevel(add_prefix_space=False)])

    @classmethod
    def openai(cls) -> ClipTokenizer:
        """The tokenizer of OpenAI CLIP and OpenCLIP, so of every Stable Diffusion: 49408 ids; built once."""
        return _openai()

    @classmethod
    def from_files(
        cls, vocab: dict[str, int], merges: Sequence[str], bos: str = BOS, eos: str = EOS
    ) -> ClipTokenizer:
        """The tokenizer of a `vocab.json` mapping and the lines of a `merges.txt` ("a b"; header allowed).

        Raises:
            CheckpointError: the two do not make a tokenizer.
        """
        lines = [line for line in merges if line.strip() and not line.startswith("#version")]
        return cls(vocab, [_pair(line.split()) for line in lines], bos, eos)

    @classmethod
    def from_folder(cls, path: str | Path) -> ClipTokenizer:
        """The tokenizer of a diffusers `tokenizer/` folder: vocab.json with merges.txt, else tokenizer.json.

        Raises:
            CheckpointError: files are missing or not what their names say.
        """
        folder = Path(path)
        settings = folder / "tokenizer_config.json"
        config = _json(settings) if settings.exists() else {}
        bos, eos = _special(config, "bos_token", BOS), _special(config, "eos_token", EOS)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            lines = _text(folder / "merges.txt").split("\n")
            return cls.from_files(_json(folder / "vocab.json"), lines, bos, eos)
        if not (folder / "tokenizer.json").exists():
            raise CheckpointError(f"{folder}: got neither vocab.json with merges.txt nor tokenizer.json")
        model = _json(folder / "tokenizer.json").get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise CheckpointError(f"{folder / 'tokenizer.json'}: got no model.vocab")
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise CheckpointError(f"{folder / 'tokenizer.json'}: got no model.merges")
        # "a b" before tokenizers 0.20, ["a", "b"] since
        pairs = [_pair(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        return cls(model["vocab"], pairs, bos, eos)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens; any string, in time near-linear in its length."""
        # JSON can smuggle in lone surrogates, which are no text: pairs are joined, the rest become U+FFFD.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return ids

    def files(self, pad_id: int | None = None) -> dict[str, str]:
        """File name to content of a `tokenizer/` folder that transformers and `from_folder` load.

        Args:
            pad_id: the family's id after end-of-text (SD2 and SDXL's second: 0); None is end-of-text.
        """
        names = {i: token for token, i in self.vocab.items()}
        pad = names[self.eos_id if pad_id is None else pad_id]
        specials = {"bos_token": self._bos, "eos_token": self._eos, "unk_token": self._eos, "pad_token": pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **specials}
        merges = "".join(f"{a} {b}\n" for a, b in self._merges)
        return {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + merges,
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(specials, indent=2) + "\n",
        }


@cache
def _openai() -> ClipTokenizer:
    packed = resources.files("diffray.model").joinpath("data", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + OPENAI_MERGES]
    merges = [_pair(line.split()) for line in lines]
    letters = sorted(ByteLevel.alphabet())  # code point order is the order of CLIP's ids
    tokens = [*letters, *(a + END_OF_WORD for a in letters), *(a + b for a, b in merges), BOS, EOS]
    return ClipTokenizer({token: i for i, token in enumerate(tokens)}, merges)


def _pair(parts: object) -> tuple[str, str]:
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"tokenizer: a merge joins two tokens, got {parts!r}")
    return parts[0], parts[1]


def _special(config: dict[str, Any], name: str, default: str) -> str:
    """A special token of tokenizer_config.json: a string, or an object with its "content"."""
    token = config.get(name) or default
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, allowed is an object")
    return value
