"""Images with adapters: diffusers' with the same file, and the same bytes in whatever company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffray.model import Engine, ImageRequest, Model, load_model
from diffray.model.weights.texts import load_texts

from .. import oracle
from . import files

SIZE = {"width": oracle.SIDE, "height": oracle.SIDE}
BASE: dict[str, Any] = {"negative_prompt": oracle.NEGATIVE, "guidance_scale": 4.0, **SIZE}
SLOW = pytest.mark.slow


def loaded(kind: str, adapters: dict[str, str], **options: Any) -> Model:
    return load_model(str(oracle.folder(kind)), device="cpu", dtype="float32", adapters=adapters, **options)


def compare(kind: str, adapters: dict[str, str], weights: dict[str, float], theirs: list[str]) -> None:
    """Ours with these adapters is diffusers' with those files, and not what it is without."""
    model = loaded(kind, adapters)
    got = oracle.latents(model, steps=2, adapters=list(weights.items()), **BASE)
    pipe = files.pipeline(kind, *zip(theirs, weights.values(), strict=True))
    wanted = oracle.theirs(pipe, num_inference_steps=2, **BASE)
    assert oracle.relative(got, wanted) < oracle.TOLERANCE
    assert oracle.relative(oracle.latents(model, steps=2, **BASE), wanted) > 0.05


CASES = [
    ("sd1", "kohya"),
    ("sdxl", "kohya-single"),
    ("sd2", "peft"),
    *(pytest.param(kind, layout, marks=SLOW) for kind in ("sd1", "sd2", "sdxl") for layout in files.LAYOUTS),
]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_an_image_is_that_of_diffusers(kind: str, layout: str, tmp_path: Path) -> None:
    file = files.write(tmp_path / "own.safetensors", kind, layout)
    twin = file
    if layout == "kohya-single" and kind != "sdxl":  # diffusers knows these block numbers in SDXL alone
        twin = files.write(tmp_path / "twin.safetensors", kind, "kohya")
    compare(kind, {"own": file}, {"own": 0.7}, [twin])


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=SLOW)])
def test_convolutions_and_two_adapters_at_once(kind: str, tmp_path: Path) -> None:
    conv = files.write(tmp_path / "conv.safetensors", kind, endings=files.CONVOLUTIONS, alpha=1.0)
    style = files.write(tmp_path / "style.safetensors", kind, "peft", seed=1, dtype=torch.float16)
    compare(kind, {"style": style, "conv": conv}, {"conv": 1.2, "style": -0.5}, [conv, style])


def test_a_text_encoder_alone(tmp_path: Path) -> None:
    """The UNet stays as it is, so that the image shares calls with images without adapters."""
    made = {p: f for p, f in files.factors("sdxl").items() if p[0] != "unet"}
    file = files.save(tmp_path / "text.safetensors", files.kohya_file("sdxl", made))
    compare("sdxl", {"text": file}, {"text": 1.0}, [file])
    engine = Engine(loaded("sdxl", {"text": file}), batch_size=2)
    calls = engine.network.calls
    engine.generate([ImageRequest(steps=2, **BASE), ImageRequest(steps=2, adapters="text", **BASE)])
    assert engine.network.calls - calls == 2


def test_text_that_is_encoded_elsewhere(tmp_path: Path) -> None:
    """An engine without towers asks for the adapters that change them."""
    file = files.write(tmp_path / "own.safetensors", "sdxl")
    source, adapters = str(oracle.folder("sdxl")), {"own": file}
    texts = load_texts(source, device="cpu", adapters=adapters)
    away = load_model(source, device="cpu", adapters=adapters, text=texts.encode)
    for own in ("own:0.5", None, "own"):
        asked: dict[str, Any] = {"steps": 1, "adapters": own, **BASE}
        assert oracle.picture(away, **asked) == oracle.picture(loaded("sdxl", adapters), **asked)


# Company ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("adapters")
    one = files.write(folder / "one.safetensors", "sd1")
    two = files.write(folder / "two.safetensors", "sd1", "peft", seed=1)
    return loaded("sd1", {"one": one, "two": two})


def requests() -> list[ImageRequest]:
    """Every set of the two adapters, by two samplers and lengths."""
    sets: tuple[Any, ...] = (None, "one", "two:0.5", "two:0.5,one", "one:-1")
    return [
        ImageRequest(prompt=prompt, seed=seed, steps=2 + seed, sampler=sampler, adapters=own, **BASE)
        for seed, own in enumerate(sets)
        for prompt, sampler in (("a fox", "euler"), ("a red fox", "euler_ancestral"))
    ]


def pixels(engine: Engine, asked: list[ImageRequest]) -> list[bytes]:
    return [result.image.tobytes() for result in engine.generate(asked) if result.image is not None]


def test_an_image_does_not_depend_on_its_company(model: Model) -> None:
    asked = requests()
    alone = [pixels(Engine(model, batch_size=4), [one])[0] for one in asked]
    assert len(set(alone)) == len(asked)
    engine = Engine(model, batch_size=4)
    assert pixels(engine, asked) == alone
    assert pixels(engine, asked[::-1]) == alone[::-1]  # after other switches


def test_order_and_weight_zero_do_not_matter(model: Model) -> None:
    def made(adapters: Any) -> bytes:
        return pixels(Engine(model, batch_size=1), [ImageRequest(steps=2, adapters=adapters, **BASE)])[0]

    assert made("one:0.5,two") == made("two,one:0.5")
    assert made("one:0,two") == made("two") != made(None) == made("one:0")


@SLOW
def test_a_compiled_network_sees_other_weights(model: Model) -> None:
    torch._dynamo.reset()
    engine = Engine(model, batch_size=1)
    engine.network.unet = torch.compile(model.unet, dynamic=False, backend="aot_eager")
    asked = [ImageRequest(steps=2, adapters=own, **BASE) for own in (None, "one", None, "two")]
    compiled = [engine.generate([one])[0].image for one in asked]
    plain = [Engine(model, batch_size=1).generate([one])[0].image for one in asked]
    for got, wanted in zip(compiled, plain, strict=True):
        assert got is not None
        assert wanted is not None
        assert oracle.levels(got, wanted) <= 1
    assert compiled[0] == compiled[2] != compiled[1]
