"""Text encoders alone, and models without them."""

from __future__ import annotations

import pytest
import torch

from diffray.model import CheckpointError, Engine, ImageRequest, InvalidRequest, load_model
from diffray.model.networks.text import Encoded
from diffray.model.weights.texts import load_texts

from .. import oracle

PROMPTS = ["", "a red fox", "a (red:1.3) fox, " * 30]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_they_encode_what_the_whole_model_does(kind: str) -> None:
    whole, alone = oracle.model(kind), load_texts(str(oracle.folder(kind)), device="cpu")
    assert alone.checksum == whole.checksum
    assert (alone.device, alone.dtype) == (whole.device, whole.dtype)
    for prompt in PROMPTS:
        for skip in (0, 1):
            ours, theirs = alone.encode(prompt, skip), whole.text.encode(prompt, skip)
            assert torch.equal(ours.context, theirs.context)
            assert ours.chunks == theirs.chunks
            assert (ours.pooled is None) == (theirs.pooled is None) == (kind == "sd1")
            assert ours.pooled is None or torch.equal(ours.pooled, theirs.pooled)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_model_whose_text_is_encoded_elsewhere_makes_the_same_images(kind: str) -> None:
    source = str(oracle.folder(kind))
    alone, asked = load_texts(source, device="cpu"), list[str]()

    def encode(prompt: str, clip_skip: int, adapters: tuple[object, ...]) -> Encoded:
        asked.append(prompt)
        return alone.encode(prompt, clip_skip)

    model = load_model(source, device="cpu", text=encode)
    assert list(model.text.parameters()) == [], "no tower is loaded"
    size = {"width": oracle.SIDE, "height": oracle.SIDE, "steps": 2, "guidance_scale": 4.0}
    requests = [
        ImageRequest(prompt=PROMPTS[1], seed=1, **size),
        ImageRequest(prompt=PROMPTS[2], negative_prompt="blurry", seed=2, clip_skip=1, **size),
    ]
    engine = Engine(model)
    for request in requests:
        engine.prefetch(request)
    fetched = len(asked)
    ours, theirs = engine.generate(requests), Engine(oracle.model(kind)).generate(requests)
    for own, other in zip(ours, theirs, strict=True):
        assert own.image is not None
        assert other.image is not None
        assert own.image.tobytes() == other.image.tobytes()
    assert len(asked) == fetched, "all was prefetched"
    assert len(set(asked)) >= 3


def test_prefetching_validates_and_asks_nobody_where_the_towers_are_here() -> None:
    engine = Engine(oracle.model("sd1"))
    before = engine.model.text.cache.misses
    engine.prefetch(ImageRequest(prompt="never seen before"))
    assert engine.model.text.cache.misses == before
    away = Engine(load_model(str(oracle.folder("sd1")), device="cpu", text=oracle.model("sd1").text.encode))
    with pytest.raises(InvalidRequest, match="clip_skip"):
        away.prefetch(ImageRequest(prompt="a", clip_skip=12))


def test_an_encoder_of_another_type_is_refused() -> None:
    half = load_texts(str(oracle.folder("sd1")), device="cpu", dtype="bfloat16")
    model = load_model(str(oracle.folder("sd1")), device="cpu", text=half.encode)
    with pytest.raises(CheckpointError, match=r"got torch\.bfloat16, the model has torch\.float32"):
        model.text.encode("a")
