"""The engine as encoder and decoder: diffusers' autoencoder is the reference, the engine's thread does the work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffray.model import Engine, GenerationError, ImageRequest, InvalidRequest
from diffray.model.images import to_tensor
from diffray.model.latents import TILE, WHOLE, _tile
from diffray.model.preparation import prepare
from tests.model import oracle
from tests.model.oracle import TOLERANCE, source_image

WAIT = 60.0


@pytest.fixture(params=[False, True], ids=["calling thread", "background thread"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(oracle.model("sd1"), batch_size=2)
    if request.param:
        made.start()
    yield made
    made.close()


def theirs(kind: str, image: Image.Image, seed: int | None) -> Tensor:
    """diffusers' latents, in the UNet's scale."""
    vae = oracle.components(kind)["vae"]
    posterior = vae.encode(to_tensor(image)[None]).latent_dist
    sample = posterior.mode() if seed is None else posterior.sample(torch.Generator().manual_seed(seed))
    return sample[0] * vae.config.scaling_factor


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "upscaler"])
def test_encode_and_decode_are_the_autoencoder(kind: str, seed: int | None) -> None:
    engine, image = Engine(oracle.model(kind)), source_image(48, 32)
    latents = engine.encode(image, seed=seed).result()
    wanted = theirs(kind, image, seed)
    assert oracle.relative(latents, wanted) < TOLERANCE
    assert not latents.is_inference()
    assert latents.device.type == "cpu"
    vae = oracle.components(kind)["vae"]
    pixels = vae.decode(wanted[None] / vae.config.scaling_factor).sample[0]
    levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    assert oracle.levels(engine.decode(latents).result(), Image.fromarray(levels)) <= 1


def test_a_seed_draws_what_image_to_image_draws_first(engine: Engine) -> None:
    """Sampled latents are those that an image-to-image run of that seed adds its noise to."""
    image = source_image()
    request = ImageRequest(init_image=image, steps=4, strength=0.5, sampler="euler", seed=9)
    latents = engine.encode(image, seed=9).result(WAIT)
    prepared = prepare(engine.model, request.resolved(engine.model.config))
    generator = torch.Generator().manual_seed(9)
    torch.randn((1, *latents.shape), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    assert torch.equal(prepared.x, latents + noise * float(prepared.table.sigmas[0]))


def test_sizes(engine: Engine) -> None:
    assert engine.encode(source_image(47, 31)).result(WAIT).shape == (4, 3, 5)
    assert engine.encode(source_image(47, 31), width=64, height=8).result(WAIT).shape == (4, 1, 8)
    for field, bad in (("width", 12), ("height", 0), ("width", 1 << 20), ("height", "8"), ("width", 8.0)):
        with pytest.raises(InvalidRequest) as caught:
            engine.encode(source_image(), **{field: bad})  # type: ignore[arg-type]
        assert caught.value.field == field


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(16, 4, 4), torch.zeros(4, 4), torch.zeros(4, 0, 4), torch.full((4, 4, 4), torch.nan), "x"],
)
def test_bad_latents_are_refused(engine: Engine, bad: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.decode(bad)
    assert caught.value.field == "latents"


def test_between_the_steps_of_others(engine: Engine) -> None:
    """Bytes of images and of what is encoded between their steps are the same as alone, from many threads."""
    request = ImageRequest(prompt="fox", steps=6, width=32, height=32, seed=3)
    alone = Engine(oracle.model("sd1"), batch_size=2).generate([request])[0].image
    latents = Engine(oracle.model("sd1")).encode(source_image()).result()
    found: list[Future[Tensor]] = []

    def encode() -> None:
        found.extend(engine.encode(source_image()) for _ in range(5))

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    images = engine.generate([request] * 3)
    for thread in threads:
        thread.join(WAIT)
    assert len(found) == 15
    assert all(torch.equal(future.result(WAIT), latents) for future in found)
    assert all(result.image is not None and alone is not None for result in images)
    assert {result.image.tobytes() for result in images if result.image} == {
        alone.tobytes() if alone else b""
    }


def test_a_broken_picture_fails_alone(engine: Engine) -> None:
    broken = source_image()
    broken.load = lambda: (_ for _ in ()).throw(OSError("truncated"))  # type: ignore[assignment,method-assign]
    with pytest.raises(GenerationError, match="truncated"):
        engine.encode(broken).result(WAIT)
    assert engine.encode(source_image()).result(WAIT).isfinite().all()
    assert engine.failure is None


def test_what_waits_when_the_engine_ends() -> None:
    engine = Engine(oracle.model("sd1"), batch_size=1).start()
    engine.submit(ImageRequest(steps=3, width=32, height=32))
    later = [engine.decode(torch.zeros(4, 4, 4)) for _ in range(3)]
    later[1].cancel()
    engine.close()
    assert [future.cancelled() or bool(future.result(0)) for future in later] == [True] * 3
    with pytest.raises(GenerationError, match="closed"):
        engine.encode(source_image())


def test_what_waits_when_the_engine_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(oracle.model("sd1"), batch_size=1)
    reached, go = threading.Event(), threading.Event()

    def broken(*_: Any) -> None:
        reached.set()
        go.wait(WAIT)
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr("diffray.model.flight.advance", broken)
    engine.submit(ImageRequest(steps=3, width=32, height=32))
    engine.start()
    reached.wait(WAIT)
    waits = engine.decode(torch.zeros(4, 4, 4))
    go.set()
    with pytest.raises(GenerationError, match="engine stopped"):
        waits.result(WAIT)


def test_only_large_pictures_are_tiled() -> None:
    """No size in SDXL's training buckets (Podell et al. 2023, appendix I) is, nor any within its area."""
    for width, height in ((1024, 1024), (1536, 640), (2048, 512), (1216, 832), (1536, 1536)):
        assert _tile(width, height) is None
    assert _tile(2048, 2048) == TILE
    assert _tile(WHOLE // 1024 + 8, 1024) == TILE
