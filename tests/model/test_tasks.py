"""Every task and every way to say things, against diffusers' pipelines or a computation by hand (I3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffray.model import Engine, GenerationError, ImageRequest, Model, load_model
from diffray.model.latents import decode, encode
from diffray.model.networks.tiling import tiled
from tests.model import oracle
from tests.model.oracle import NEGATIVE, PROMPT, SIDE, TOLERANCE, mask_image, source_image

Record = Callable[[str, object], None]

SIZE: dict[str, Any] = {"width": SIDE, "height": SIDE}
STEPS = 5
SCHEDULE = {"dpmpp_2m": "karras", "euler_ancestral": "trailing", "heun": "linspace"}


def check(
    record: Record,
    kind: str,
    sampler: str,
    *,
    name: str | None = None,
    fields: dict[str, Any],
    arguments: dict[str, Any],
    keys: dict[str, Any] | None = None,
    steps: int = STEPS,
    guidance: float = 4.0,
) -> None:
    """Our latents against those of diffusers' class `name`."""
    schedule = SCHEDULE.get(sampler, "leading")
    pipe = oracle.pipeline(kind, name, oracle.scheduler(sampler, schedule, **(keys or {})))
    wanted = oracle.theirs(pipe, seed=3, num_inference_steps=steps, guidance_scale=guidance, **arguments)
    got = oracle.latents(
        oracle.model(kind),
        seed=3,
        steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        schedule=schedule,
        **fields,
    )
    error = oracle.relative(got, wanted)
    record("relative", error)
    assert error < TOLERANCE


def some_slow(quick: Sequence[str], slow: Sequence[str]) -> list[Any]:
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


# Image to image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_image_to_image(kind: str, strength: float, record_property: Record) -> None:
    said: dict[str, Any] = {"strength": strength, "negative_prompt": NEGATIVE}
    check(
        record_property,
        kind,
        "euler_ancestral",
        name="Img2Img",
        fields={"init_image": source_image(), **said},
        arguments={"image": source_image(), **said},
    )


@pytest.mark.parametrize(
    "sampler",
    some_slow(
        ["ddim", "dpmpp_2m", "pndm"],
        ["euler", "heun", "dpm2", "unipc", "deis", "lcm", "ddpm", "dpmpp_2m_sde"],
    ),
)
def test_image_to_image_samplers(sampler: str, record_property: Record) -> None:
    check(
        record_property,
        "sd1",
        sampler,
        name="Img2Img",
        fields={"init_image": source_image(), "strength": 0.6},
        arguments={"image": source_image(), "strength": 0.6},
    )


def test_image_to_image_picture() -> None:
    pipe = oracle.pipeline("sd1", "Img2Img", oracle.scheduler("euler", "leading"))
    wanted = oracle.theirs(
        pipe, output="pil", image=source_image(40, 24), strength=0.5, num_inference_steps=4
    )
    got = oracle.picture(
        oracle.model("sd1"),
        init_image=source_image(40, 24),
        strength=0.5,
        steps=4,
        sampler="euler",
        schedule="leading",
    )
    assert got.size == (40, 24)
    assert oracle.levels(got, wanted) <= 1


def test_refiner_image_to_image(record_property: Record) -> None:
    check(
        record_property,
        "refiner",
        "euler",
        fields={"init_image": source_image(), "strength": 0.5},
        arguments={"image": source_image(), "strength": 0.5},
    )


# Inpainting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.9999, 0.5])
@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("sd1", "euler_ancestral"),
        ("sdxl", "euler"),
        ("sd1-inpaint", "ddim"),
        ("sdxl-inpaint", "euler_ancestral"),
        *(
            pytest.param("sd1", sampler, marks=pytest.mark.slow)
            for sampler in ("ddim", "dpmpp_2m", "heun", "pndm", "lcm", "unipc")
        ),
        pytest.param("sdxl", "euler_ancestral", marks=pytest.mark.slow),
        *(
            pytest.param("sd1-inpaint", sampler, marks=pytest.mark.slow)
            for sampler in ("euler_ancestral", "dpmpp_2m", "heun", "pndm")
        ),
    ],
)
def test_inpaint(kind: str, sampler: str, strength: float, record_property: Record) -> None:
    """Networks with mask channels, and those without, which blend after every step."""
    check(
        record_property,
        kind,
        sampler,
        name="Inpaint",
        fields={"init_image": source_image(), "mask": mask_image(), "strength": strength},
        arguments={
            "image": source_image(),
            "mask_image": mask_image(),
            "strength": strength,
            **SIZE,
        },
    )


def test_inpaint_keeps_what_the_mask_does_not_repaint() -> None:
    own = oracle.model("sd1")
    source = torch.from_numpy(np.array(source_image())).permute(2, 0, 1) / 127.5 - 1
    got = oracle.latents(own, init_image=source_image(), mask=mask_image(), steps=2, seed=4)
    generator = torch.Generator().manual_seed(4)
    mean, std = own.vae.moments(source[None])
    noise = torch.randn((1, 4, 4, 4), generator=generator)
    kept = own.vae.scaled(mean + std * noise)[0]
    assert torch.allclose(got[:, 1:, 2:], kept[:, 1:, 2:], atol=1e-5)
    assert (got - kept)[:, :, :2].abs().max() > 0.1


def test_paste_back() -> None:
    ask: dict[str, Any] = {"init_image": source_image(), "mask": mask_image(), "steps": 2}
    plain = np.array(oracle.picture(oracle.model("sd1"), **ask))
    pasted = np.array(oracle.picture(oracle.model("sd1"), **ask, paste_back=True))
    painted = np.array(mask_image()) > 0
    assert np.array_equal(pasted[painted], plain[painted])
    assert np.array_equal(pasted[~painted], np.array(source_image())[~painted])
    assert not np.array_equal(pasted[~painted], plain[~painted])


@pytest.mark.parametrize(("gray", "repaints"), [(0, False), (127, False), (128, True), (255, True)])
def test_mask_is_binary(gray: int, repaints: bool) -> None:
    ask: dict[str, Any] = {"init_image": source_image(), "steps": 2, "strength": 0.5}
    full, flat = (Image.new("L", (SIDE, SIDE), level) for level in (255 * repaints, gray))
    both = [oracle.latents(oracle.model("sd1"), mask=mask, **ask) for mask in (full, flat)]
    assert torch.equal(*both)


# Other tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(7.5, 1.5), (4.0, 1.0), (1.0, 1.5)])
def test_instruct_pix2pix(scales: tuple[float, float], record_property: Record) -> None:
    """Guidance on the text and on the source image; without the first diffusers drops both."""
    check(
        record_property,
        "pix2pix",
        "euler_ancestral",
        guidance=scales[0],
        fields={"init_image": source_image(), "image_guidance_scale": scales[1]},
        arguments={"image": source_image(), "image_guidance_scale": scales[1]},
    )


@pytest.mark.parametrize("negative", [*some_slow([NEGATIVE], [""]), None])
def test_sdxl_edit(negative: str | None, record_property: Record) -> None:
    said: dict[str, Any] = {"image_guidance_scale": 1.7, "negative_prompt": negative}
    check(
        record_property,
        "sdxl-edit",
        "euler",
        fields={"init_image": source_image(), **said},
        arguments={"image": source_image(), **said, **SIZE},
    )


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_depth(strength: float, record_property: Record) -> None:
    depth = source_image(seed=1).convert("L")
    tensor = torch.from_numpy(np.array(depth, dtype=np.float32))[None]
    check(
        record_property,
        "depth",
        "euler_ancestral",
        fields={"init_image": source_image(), "depth": depth, "strength": strength},
        arguments={"image": source_image(), "depth_map": tensor, "strength": strength},
    )


def test_depth_in_sixteen_bits() -> None:
    """Depth maps often come as 16-bit pictures; the range is stretched, so the unit does not matter."""
    eight = np.array(source_image(seed=1).convert("L"))
    maps = [Image.fromarray(eight), Image.fromarray(eight.astype(np.uint16) * 257)]
    assert maps[1].mode.startswith("I;16")
    both = [
        oracle.latents(oracle.model("depth"), init_image=source_image(), depth=depth, steps=2)
        for depth in maps
    ]
    assert oracle.relative(*both) < TOLERANCE


@pytest.mark.parametrize("level", [0, 20, 350])
def test_upscale(level: int, record_property: Record) -> None:
    small = source_image(8, 12)
    check(
        record_property,
        "upscaler",
        "ddim",
        keys={"prediction_type": "v_prediction", "betas": oracle.UPSCALER_BETAS},
        fields={"init_image": small, "noise_level": level},
        arguments={"image": small, "noise_level": level},
    )


def test_upscale_picture() -> None:
    small = source_image(8, 12)
    wanted = oracle.theirs(oracle.pipeline("upscaler"), output="pil", image=small, num_inference_steps=3)
    got = oracle.picture(oracle.model("upscaler"), init_image=small, steps=3)
    assert got.size == (32, 48)
    assert oracle.levels(got, wanted) <= 1


# Text ------------------------------------------------------------------------------------------------------


def embedded(own: Model, prompt: str, chunks: int, skip: int = 0, weigh: bool = False) -> dict[str, Tensor]:
    """Text states by transformers' towers in diffusers' way, chunk by chunk, and the pooled state."""
    xl = own.config.family == "sdxl"
    parts = oracle.components("sdxl" if xl else "sd1")
    towers = [parts[name] for name in ("text_encoder", "text_encoder_2") if parts.get(name) is not None]
    per_tower, pooled = [], None
    empty = own.text.tokenize("")
    for number, (tower, own_chunks) in enumerate(zip(towers, own.text.tokenize(prompt), strict=True)):
        states = []
        for chunk in own_chunks + empty[number] * (chunks - len(own_chunks)):
            out = tower(torch.tensor([chunk.ids]), output_hidden_states=True)
            state = out.hidden_states[-(skip + (2 if xl else 1))]
            if not xl:
                state = tower.final_layer_norm(state)
            if weigh:
                heavy = state * torch.tensor(chunk.weights)[None, :, None]
                state = heavy * (state.mean() / heavy.mean())
            if number == 1 and not states:
                pooled = out.text_embeds
            states.append(state)
        per_tower.append(torch.cat(states, dim=1))
    found = {"prompt_embeds": torch.cat(per_tower, dim=-1)}
    return found if pooled is None else found | {"pooled_prompt_embeds": pooled}


def check_embedded(
    record: Record, kind: str, prompt: str, chunks: int, *, skip: int = 0, weigh: bool = False
) -> None:
    own = oracle.model(kind)
    assert len(own.text.tokenize(prompt)[0]) == chunks
    positive = embedded(own, prompt, chunks, skip, weigh)
    negative = embedded(own, NEGATIVE, chunks, skip, weigh)
    pipe = oracle.pipeline(kind, planner=oracle.scheduler("euler", "leading"))
    wanted = oracle.theirs(
        pipe,
        num_inference_steps=3,
        guidance_scale=4.0,
        **positive,
        **{f"negative_{name}": value for name, value in negative.items()},
        **SIZE,
    )
    got = oracle.latents(
        own,
        prompt=prompt,
        negative_prompt=NEGATIVE,
        clip_skip=skip,
        steps=3,
        guidance_scale=4.0,
        sampler="euler",
        schedule="leading",
        **SIZE,
    )
    error = oracle.relative(got, wanted)
    record("relative", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_long_prompts(kind: str, record_property: Record) -> None:
    """Three chunks against one of the negative prompt; transformers sees one chunk at a time."""
    words = " ".join(
        f"{word} house" for word in ["red", "green", "blue", "white", "black", "old", "new", "big", "small"]
    )
    check_embedded(record_property, kind, f"{words} BREAK {words} BREAK fox", 3)


def test_prompt_that_overflows(record_property: Record) -> None:
    check_embedded(record_property, "sd1", "fox " * 80, 3)  # two tokens each


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_weights(kind: str, record_property: Record) -> None:
    check_embedded(record_property, kind, "a (red:1.4) fox, ((snow)) [tree]", 1, weigh=True)


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_clip_skip(kind: str, skip: int, record_property: Record) -> None:
    if kind == "sdxl" and skip == 2:
        pytest.skip("the tiny first tower has no block left")
    check_embedded(record_property, kind, PROMPT, 1, skip=skip)


# Passes and intervals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscale", ["latent", "latent-nearest", "lanczos"])
def test_hires_fix_is_two_passes(upscale: str, record_property: Record) -> None:
    """diffusers' two pipelines with one generator between them."""
    generator = torch.Generator().manual_seed(6)
    # Not an ancestral sampler: diffusers draws noise in the last step too, and multiplies it by 0.
    planner = oracle.scheduler("euler", "linspace")
    common: dict[str, Any] = {"prompt": PROMPT, "generator": generator, "guidance_scale": 4.0}
    first = oracle.pipeline("sd1", planner=planner)
    small = first(num_inference_steps=3, output_type="latent", **common, **SIZE).images
    larger: Any
    if upscale == "lanczos":
        picture = first.image_processor.postprocess(
            first.vae.decode(small / first.vae.config.scaling_factor).sample, output_type="pil"
        )[0]
        larger = picture.resize((48, 48), Image.Resampling.LANCZOS)
    else:
        larger = F.interpolate(small, size=(6, 6), mode={"latent": "bilinear"}.get(upscale, "nearest-exact"))
    second = oracle.pipeline("sd1", "Img2Img", planner)
    wanted = second(image=larger, strength=0.6, num_inference_steps=5, output_type="pil", **common).images[0]
    got = oracle.picture(
        oracle.model("sd1"),
        seed=6,
        steps=3,
        guidance_scale=4.0,
        sampler="euler",
        schedule="linspace",
        hires_scale=1.5,
        hires_strength=0.6,
        hires_steps=5,
        hires_upscale=upscale,
        **SIZE,
    )
    assert got.size == (48, 48)
    assert oracle.levels(got, wanted) <= 1
    record_property("levels", oracle.levels(got, wanted))


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.2, 0.6), (0.5, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_guidance_interval(interval: tuple[float, float], record_property: Record) -> None:
    """A loop by hand over diffusers' parts."""
    steps, scale = 5, 6.0
    planner = oracle.scheduler("euler", "leading")
    pipe = oracle.pipeline("sd1", planner=planner)
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    planner.set_timesteps(steps)
    x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)) * planner.init_noise_sigma
    for number, time in enumerate(planner.timesteps):
        scaled = planner.scale_model_input(x, time)
        noise = pipe.unet(scaled, time, positive).sample
        if interval[0] <= number / steps < interval[1]:
            without = pipe.unet(scaled, time, negative).sample
            noise = without + scale * (noise - without)
        x = planner.step(noise, time, x).prev_sample
    own = oracle.model("sd1")
    engine = Engine(own, batch_size=1, rows=1)
    request = ImageRequest(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        steps=steps,
        guidance_scale=scale,
        guidance_start=interval[0],
        guidance_stop=interval[1],
        sampler="euler",
        schedule="leading",
        output="latents",
        **SIZE,
    )
    got = engine.generate([request])[0].latents
    assert got is not None
    error = oracle.relative(got, x[0])
    record_property("relative", error)
    assert error < TOLERANCE
    guided = sum(interval[0] <= number / steps < interval[1] for number in range(steps))
    assert engine.network.calls == steps + guided  # steps without guidance cost half


def test_latents_as_source(record_property: Record) -> None:
    start = torch.randn((4, 4, 6), generator=torch.Generator().manual_seed(0))
    check(
        record_property,
        "sd1",
        "euler",
        name="Img2Img",
        fields={"init_latents": start, "strength": 0.6},
        arguments={"image": start[None], "strength": 0.6},
    )


# The autoencoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 104)])
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_tiles_meet_without_seams(size: tuple[int, int], way: str) -> None:
    """Tiles change the result, by the statistics of their norms, but not more where they meet."""
    own = oracle.model("sd1")
    width, height = size
    if way == "decode":
        coarse = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
        z = F.interpolate(coarse, size=(height // 8, width // 8), mode="bilinear")
        whole, tiles = own.vae.decode(z), own.vae.decode(z, tile=32)
    else:
        pixels = torch.from_numpy(np.array(source_image(*size))).permute(2, 0, 1)[None] / 127.5 - 1
        whole, tiles = own.vae.encode(pixels), own.vae.encode(pixels, tile=32)
    assert tiles.isfinite().all()
    assert tiles.shape == whole.shape
    assert float((tiles - whole).abs().mean()) < 0.8 * float(whole.std())
    for axis in (2, 3):
        other = [d for d in range(4) if d != axis]
        jumps, usual = (picture.diff(dim=axis).abs().mean(dim=other) for picture in (tiles, whole))
        assert float(jumps.max()) < 2.5 * float(usual.max())


@pytest.mark.parametrize(("tile", "size"), [(8, (20, 27)), (16, (16, 40)), (5, (5, 6))])
def test_tiles_of_a_local_function_are_exact(tile: int, size: tuple[int, int]) -> None:
    x = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(0))
    up = torch.nn.Upsample(scale_factor=2, mode="nearest")
    assert torch.allclose(tiled(lambda part: up(part) * 3, x, tile=tile, scale=2), up(x) * 3, atol=1e-5)


def test_tiles_of_the_whole_image_change_nothing() -> None:
    own = oracle.model("sd1")
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(own.vae.decode(z), own.vae.decode(z, tile=64))


@pytest.fixture
def overflowing() -> Model:
    """A model whose autoencoder overflows in half precision on loud latents alone."""
    own = load_model(str(oracle.folder("sd1")), device="cpu", dtype="float32", vae_dtype="float16")
    own.vae.decoder.conv_in.weight.data *= 200
    own.vae.encoder.conv_in.weight.data *= 200
    return own


def test_half_precision_that_overflows_is_done_again(overflowing: Model) -> None:
    own = overflowing
    loud = 1000 * torch.randn((4, 4, 4), generator=torch.Generator().manual_seed(0))
    assert not own.vae.decode(loud[None]).isfinite().all()
    pixels = decode(own, loud)
    assert pixels.isfinite().all()
    exact = dataclasses.replace(own, vae=load_model(str(oracle.folder("sd1")), device="cpu").vae)
    exact.vae.decoder.conv_in.weight.data *= 200
    assert oracle.relative(pixels, decode(exact, loud)) < 0.05


def test_overflow_changes_no_other_image(overflowing: Model) -> None:
    """What follows an image that overflowed is still decoded in half precision, to the same bytes."""
    own = overflowing
    quiet, loud = (
        scale * torch.randn((4, 4, 4), generator=torch.Generator().manual_seed(1)) for scale in (1, 1000)
    )
    before = decode(own, quiet)
    decode(own, loud)
    assert own.vae.dtype == torch.float16
    assert torch.equal(decode(own, quiet), before)


def test_half_precision_encoding_that_overflows_is_done_again(overflowing: Model) -> None:
    own = overflowing
    own.vae.encoder.conv_in.bias.data.fill_(65_500)
    pixels = torch.from_numpy(np.array(source_image())).permute(2, 0, 1) / 127.5 - 1
    assert not own.vae.encode(pixels[None]).isfinite().all()
    assert encode(own, pixels, None).isfinite().all()
    assert own.vae.dtype == torch.float16


def test_autoencoder_that_is_broken_fails_the_image_alone() -> None:
    own = load_model(str(oracle.folder("sd1")), device="cpu", dtype="float32")
    own.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    engine = Engine(own)
    ticket = engine.submit(ImageRequest(steps=1, **SIZE))
    fine = engine.submit(ImageRequest(steps=1, **SIZE, output="latents"))
    while engine.step():
        pass
    with pytest.raises(GenerationError, match="non-finite"):
        ticket.future.result(0)
    assert fine.future.result(0).latents is not None
