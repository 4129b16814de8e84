"""What the text encoder is taught about a caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training import captions, vocabulary
from training.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, random_scene


def test_answers_repeat_the_caption_and_nothing_else() -> None:
    red, blue = Thing("red", "star", 0, 0, 10), Thing("blue", "cross", 0, 0, 10)
    c, s, p = list(COLOURS), list(SHAPES), list(RELATIONS)
    two = Scene((red, blue), "green", None, "above", True)
    assert captions.answers(two) == [
        1 + c.index("red"), 1 + s.index("star"), 0, 1 + p.index("above"),
        1 + c.index("blue"), 1 + s.index("cross"), 1 + p.index("below"), 1 + c.index("green"),
    ]  # fmt: skip
    one = Scene((red,), "green", "large", None, False)
    size = 1 + list(SIZES).index("large")
    assert captions.answers(one) == [1 + c.index("red"), 1 + s.index("star"), size, 0, 0, 0, 0, 0]


def test_every_caption_ends_before_the_positions_that_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    told = [random_scene(rng).caption for _ in range(2000)]
    vocabulary.save(tmp_path / "tokenizer", *vocabulary.build(told))
    words = captions.tokenizer(tmp_path)
    ids = captions.tokens(words, told)
    first_read = min(start for start, _ in captions.READ.values())
    assert ids.shape == (2000, captions.POSITIONS)
    assert (ids[:, first_read:] == words.eos_token_id).all()
    assert (ids[:, first_read - 1] == words.eos_token_id).all()


def test_every_head_is_asked_one_answer() -> None:
    model = captions.Reader(600)
    logits = model(torch.zeros(2, captions.POSITIONS, dtype=torch.long))
    rng = np.random.default_rng(2)
    truth = torch.tensor([captions.answers(random_scene(rng)) for _ in range(500)])
    assert len(logits) == truth.shape[1]
    assert all(truth[:, i].max() < part.shape[2] for i, part in enumerate(logits))
