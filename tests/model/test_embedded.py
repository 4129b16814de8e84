"""The embedded model is a real one: it answers captions, and other tools load it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffray.model import Engine, ImageRequest, Model, convert, load_model
from diffray.model.weights.source import EMBEDDED, resolve
from training.evaluate import held_out
from training.judge import judge, look
from training.scenes import Scene, Thing, draw


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model()


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    return Engine(model)


def test_it_is_small_and_whole(model: Model) -> None:
    files = [path for path in resolve(EMBEDDED).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    assert (resolve(EMBEDDED) / "README.md").is_file()
    assert model.config.family in {"sd1", "sd2"}
    assert model.config.noise.prediction_type == "v_prediction"
    assert (model.config.defaults.width, model.config.defaults.height) == (64, 64)


@pytest.mark.slow
def test_it_answers_captions(engine: Engine) -> None:
    """A sample of the held-out captions; `training.evaluate` measures all 500."""
    scenes = held_out(24)
    results = engine.generate(ImageRequest(prompt=s.caption, seed=i, steps=20) for i, s in enumerate(scenes))
    verdicts = [judge(s, r.image) for s, r in zip(scenes, results, strict=True) if r.image is not None]
    # Its card has the measured shares; these bounds only tell a working model from a broken one.
    assert sum(v.right for v in verdicts) >= 21
    assert sum(v.count for v in verdicts) >= 21
    assert sum(v.colour for v in verdicts) >= 22
    assert sum(v.background is not False for v in verdicts) >= 22


def test_image_to_image_keeps_the_place_and_changes_the_colour(engine: Engine) -> None:
    source = draw(Scene((Thing("red", "circle", 26, 38, 18),), "white"))
    request = ImageRequest(
        prompt="a large blue circle on a white background", init_image=source, strength=0.75, seed=3, steps=20
    )
    image = engine.generate([request])[0].image
    assert image is not None
    background, found = look(image)
    assert background == "white"
    assert found[0].colour == "blue"
    assert abs(found[0].x - 26) < 10
    assert abs(found[0].y - 38) < 10


def test_inpainting_changes_only_the_mask(engine: Engine) -> None:
    source = draw(Scene((Thing("red", "circle", 16, 32, 10), Thing("green", "square", 48, 32, 10)), "white"))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    request = ImageRequest(
        prompt="a red circle left of a blue star on a white background", init_image=source, mask=mask,
        strength=1.0, seed=1, paste_back=True, steps=20,
    )  # fmt: skip
    image = engine.generate([request])[0].image
    assert image is not None
    before, after = np.asarray(source), np.asarray(image)
    assert (before[:, :32] == after[:, :32]).all()
    assert (before[:, 32:] != after[:, 32:]).any()
    _, found = look(image)
    assert {"red"} <= {f.colour for f in found}
    assert "green" not in {f.colour for f in found}


def test_diffusers_loads_it_and_makes_the_same_image(engine: Engine) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(resolve(EMBEDDED), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a green triangle left of a yellow star"
    theirs = pipeline(
        prompt,
        num_inference_steps=6,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    request = ImageRequest(prompt=prompt, steps=6, guidance_scale=4.0, seed=5)
    ours = engine.generate([request])[0].image
    difference = np.abs(np.asarray(ours, dtype=float) - theirs * 255)
    assert difference.max() < 1.5


def test_the_single_file_layout_makes_the_same_bytes(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "embedded.safetensors"
    convert(EMBEDDED, str(file), layout="single")
    request = ImageRequest(prompt="a small pink cross on a black background", seed=2, steps=4)
    first = engine.generate([request])[0].image
    second = Engine(load_model(str(file))).generate([request])[0].image
    assert first is not None
    assert second is not None
    assert first.tobytes() == second.tobytes()
