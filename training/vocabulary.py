"""The embedded model's own small CLIP vocabulary: byte-level BPE in which every caption word is one token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .scenes import COLOURS, RELATIONS, SHAPES, SIZES

START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word that a caption can hold."""
    relations = " ".join(RELATIONS).split()
    return sorted({*COLOURS, *SHAPES, *SIZES, *relations, "a", "an", "on", "background"})


def build(corpus: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges in CLIP's form, learned from `corpus` (words that end in `</w>`)."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [" ".join(pair) for pair in learned]
    # CLIP's order: every byte, every byte that ends a word, the merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in learned), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def save(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Write the tokenizer as a folder that transformers loads too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {**special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
