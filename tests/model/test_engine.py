"""The engine: an image's bytes are its own (I1, I2), no image is lost, nobody waits for ever."""

from __future__ import annotations

import functools
import io
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffray.model import (
    Cancelled,
    Engine,
    GenerationError,
    ImageRequest,
    InvalidRequest,
    OutOfMemory,
    Result,
    Ticket,
    flight,
)
from diffray.model.preparation import checked, prepare
from tests.model import oracle
from tests.model.oracle import NEGATIVE, SIDE, mask_image, source_image

BATCH, ROWS = 8, 4
WAIT = 120


def ask(**fields: Any) -> ImageRequest:
    defaults: dict[str, Any] = {
        "prompt": oracle.PROMPT,
        "steps": 3,
        "sampler": "euler_ancestral",
        "schedule": "linspace",
        "guidance_scale": 4.0,
        "seed": 5,
    }
    if not {"init_image", "init_latents"} & set(fields):
        defaults |= {"width": SIDE, "height": SIDE}
    return ImageRequest(**{**defaults, **fields})


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def make(kind: str = "sd1", batch_size: int = BATCH, rows: int = ROWS) -> Engine:
    return Engine(oracle.model(kind), batch_size=batch_size, rows=rows)


def content(result: Result) -> bytes:
    """Every bit of a result."""
    if result.image is not None:
        return np.asarray(result.image).tobytes()
    assert result.latents is not None
    return result.latents.numpy().tobytes()


def run(engine: Engine) -> None:
    while engine.step():
        pass


def finished(tickets: list[Ticket]) -> list[bytes]:
    return [content(ticket.future.result(0)) for ticket in tickets]


MIXED: list[ImageRequest] = [
    ask(output="latents"),
    ask(prompt="two cats", sampler="heun", guidance_scale=7.0, output="latents", seed=1),
    ask(sampler="dpmpp_2m", schedule="karras", steps=5, guidance_scale=1.0, output="latents", seed=2),
    ask(sampler="pndm", schedule="leading", negative_prompt=NEGATIVE, output="latents", seed=3),
    ask(init_image=source_image(), strength=0.7, sampler="ddim", schedule="leading", output="latents"),
    ask(init_image=source_image(), mask=mask_image(), steps=4, strength=1.0, output="latents", seed=4),
    ask(sampler="lcm", schedule="leading", guidance_stop=0.5, steps=4, output="latents", seed=6),
    ask(prompt="fox BREAK snow", sampler="dpmpp_2m_sde", guidance_rescale=0.4, output="latents", seed=7),
]
"""One of everything that shares a latent shape; the last has longer text and so a bucket of its own."""

OTHERS: list[ImageRequest] = [
    ask(width=40, height=24, output="latents", sampler="dpmpp_2m_sde", seed=8),
    ask(width=24, height=40, output="latents", sampler="euler", seed=9),
    ask(hires_scale=1.5, hires_strength=0.5, hires_steps=4, seed=10),
    ask(hires_scale=1.5, hires_strength=0.5, hires_upscale="lanczos", seed=11),
    ask(init_image=source_image(), mask=mask_image(), paste_back=True, strength=0.6, seed=12),
]
"""Other shapes, second passes, pictures."""


@functools.cache
def alone(index: int, kind: str = "sd1") -> bytes:
    """The bytes of one of the requests above, alone in an engine."""
    return content(make(kind).generate([(MIXED + OTHERS)[index]])[0])


# Invariance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 8])
def test_batch_mates_do_not_matter(count: int) -> None:
    results = make().generate(MIXED[:count])
    assert [content(result) for result in results] == [alone(index) for index in range(count)]


def test_mixed_tasks_sizes_and_passes_in_one_engine() -> None:
    results = make().generate(MIXED + OTHERS)
    same = [content(result) == alone(index) for index, result in enumerate(results)]
    assert all(same), same


def test_calls_that_are_not_full_make_the_same_bytes() -> None:
    """A lone image in calls of 16 rows, however short they really are, against eight that fill them."""
    wanted = [content(result) for result in make(rows=16).generate(MIXED)]
    engine = make(rows=16)
    for _ in range(2):  # the second round trusts what the first has shown
        assert [content(engine.generate([request])[0]) for request in MIXED] == wanted


def test_a_list_is_begun_with_its_longest_images() -> None:
    """Then eleven steps on two places take six ticks; in the order asked, seven."""
    requests = [ask(steps=steps, seed=steps, output="latents") for steps in (1, 2, 3, 5)]
    engine = make(batch_size=2)
    results = engine.generate(requests)
    assert [result.request.steps for result in results] == [1, 2, 3, 5]
    assert engine.network.calls == 6


def test_order_does_not_matter() -> None:
    results = make().generate(MIXED[::-1])[::-1]
    assert [content(result) for result in results] == [alone(index) for index in range(len(MIXED))]


@pytest.mark.parametrize("position", [0, 3, 7, *(slow(n) for n in (1, 2, 4, 5, 6))])
def test_every_slot_is_the_same(position: int) -> None:
    fillers = [ask(seed=100 + number, sampler="euler", output="latents") for number in range(BATCH - 1)]
    results = make().generate([*fillers[:position], MIXED[0], *fillers[position:]])
    assert content(results[position]) == alone(0)


@pytest.mark.parametrize("index", [0, *(slow(n) for n in (1, 2, 3))])
@pytest.mark.parametrize("late", [1, 2, 3, 4, 5])
def test_joining_late(late: int, index: int) -> None:
    engine = make()
    neighbours = [engine.submit(ask(seed=n, steps=6, sampler="heun", output="latents")) for n in range(3)]
    for _ in range(late):
        engine.step()
    ticket = engine.submit(MIXED[index])
    run(engine)
    assert content(ticket.future.result(0)) == alone(index)
    assert all(neighbour.future.done() for neighbour in neighbours)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_cancelled_neighbours_do_not_matter(after: int) -> None:
    engine = make()
    tickets = [engine.submit(request) for request in MIXED[:7]]
    for _ in range(after):
        engine.step()
    for index in (0, 2, 4, 6):
        tickets[index].cancel()
    run(engine)
    for index in (1, 3, 5):
        assert content(tickets[index].future.result(0)) == alone(index)


def test_a_slot_keeps_nothing_of_its_last_image() -> None:
    engine = make(batch_size=1)
    results = engine.generate([MIXED[1], MIXED[3], MIXED[1], MIXED[2], MIXED[0]])
    assert [content(result) for result in results] == [alone(index) for index in (1, 3, 1, 2, 0)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_network_draws_the_same_images() -> None:
    requests = [ask(seed=1), ask(seed=2, steps=2)]
    plain = make().generate(requests)
    compiled = Engine(oracle.model("sd1"), batch_size=BATCH, rows=ROWS, compile=True).generate(requests)
    for a, b in zip(plain, compiled, strict=True):
        difference = np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("batch_size", [2, 5, slow(1), slow(16)])
def test_batch_size_does_not_matter_when_rows_are_the_same(batch_size: int) -> None:
    results = make(batch_size=batch_size).generate(MIXED)
    assert [content(result) for result in results] == [alone(index) for index in range(len(MIXED))]


@pytest.mark.parametrize("rows", [1, 3, slow(2), slow(16)])
def test_rows_change_rounding_only(rows: int) -> None:
    results = make(rows=rows).generate(MIXED)
    for index, result in enumerate(results):
        assert result.latents is not None
        wanted = torch.frombuffer(bytearray(alone(index)), dtype=torch.float32).view(result.latents.shape)
        assert oracle.relative(result.latents, wanted) < 1e-4


def requests_to(kind: str) -> list[ImageRequest]:
    return [
        ask(seed=seed, output="latents", guidance_scale=scale, **oracle.inputs(kind))
        for seed, scale in enumerate((4.0, 1.0, 2.0))
    ]


@pytest.mark.parametrize(
    "kind", ["sdxl", "pix2pix", *(slow(kind) for kind in ("depth", "upscaler", "lcm", "sdxl-inpaint"))]
)
def test_other_models(kind: str) -> None:
    requests = requests_to(kind)
    together = make(kind).generate(requests)
    for request, result in zip(requests, together, strict=True):
        assert content(make(kind).generate([request])[0]) == content(result)


def test_seed_decides_all_noise() -> None:
    twice = [content(make().generate([MIXED[0]])[0]) for _ in range(2)]
    assert twice[0] == twice[1] == alone(0)
    assert content(make().generate([ask(output="latents", seed=6)])[0]) != alone(0)


def test_threads_submit_to_a_background_engine() -> None:
    with make() as engine:
        found: dict[int, bytes] = {}

        def work(own: list[int]) -> None:
            tickets = [engine.submit(MIXED[index]) for index in own]
            for index, ticket in zip(own, tickets, strict=True):
                found[index] = content(ticket.future.result(WAIT))

        threads = [threading.Thread(target=work, args=([n, n + 4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert found == {index: alone(index) for index in range(8)}


def test_threads_generate_in_one_engine_that_nobody_started() -> None:
    engine = make()
    found: dict[int, list[bytes]] = {}

    def work(number: int) -> None:
        found[number] = [content(result) for result in engine.generate(MIXED[number : number + 2])]

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == {n: [alone(n), alone(n + 1)] for n in (0, 2, 4)}


# Tickets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        ask(),
        ask(sampler="heun"),
        ask(sampler="pndm", schedule="leading"),
        ask(init_image=source_image(), strength=0.4, steps=5),
        ask(hires_scale=1.5, hires_strength=0.5, hires_steps=4),
        ask(sampler="dpm2_ancestral", steps=1),
    ],
)
def test_progress_only_grows_and_ends_at_one(request_: ImageRequest) -> None:
    engine = make()
    ticket = engine.submit(request_)
    seen = [ticket.progress]
    while engine.step():
        seen.append(ticket.progress)
    seen.append(ticket.progress)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert ticket.step == ticket.steps
    calls_in_last_step = [value for value in seen if value < 1.0]
    assert len(set(calls_in_last_step)) == ticket.steps  # every whole step was seen once done


def test_cancelling_before_it_starts() -> None:
    engine = make()
    ticket = engine.submit(ask())
    ticket.cancel()
    assert not engine.step()
    with pytest.raises(Cancelled):
        ticket.future.result(0)
    assert engine.network.calls == 0


def test_cancelling_on_the_way_frees_the_slot_at_the_next_step() -> None:
    engine = make(batch_size=1)
    first, second = engine.submit(ask(steps=50)), engine.submit(MIXED[0])
    engine.step()
    first.cancel()
    engine.step()
    with pytest.raises(Cancelled, match="1 of 50"):
        first.future.result(0)
    assert second.step == 1
    run(engine)
    assert content(second.future.result(0)) == alone(0)


def test_cancelling_what_waits_does_not_wait_for_a_slot() -> None:
    engine = make(batch_size=1)
    tickets = [engine.submit(ask(seed=seed, steps=30)) for seed in range(6)]
    engine.step()
    for ticket in tickets[1:]:
        ticket.cancel()
    engine.step()
    assert all(ticket.future.done() for ticket in tickets[1:])
    assert not tickets[0].future.done()


def test_cancelling_after_the_end_changes_nothing() -> None:
    engine = make()
    ticket = engine.submit(MIXED[0])
    run(engine)
    ticket.cancel()
    assert not engine.step()
    assert content(ticket.future.result(0)) == alone(0)


@pytest.mark.parametrize("after", [0, 1])
def test_cancelling_the_future_itself(after: int) -> None:
    """As asyncio does when the task that awaits a wrapped future is cancelled."""
    engine = make()
    tickets = [engine.submit(ask(seed=1)), engine.submit(MIXED[0])]
    for _ in range(after):
        engine.step()
    assert tickets[0].future.cancel()
    run(engine)
    with pytest.raises(CancelledError):
        tickets[0].future.result(0)
    assert content(tickets[1].future.result(0)) == alone(0)


def test_previews() -> None:
    engine = make()
    ticket = engine.submit(ask(width=40, height=24))
    assert ticket.preview() is None
    engine.step()
    first = ticket.preview()
    assert first is not None
    assert (first.size, first.mode) == ((40, 24), "RGB")
    engine.step()
    second = ticket.preview()
    assert second is not None
    assert np.array(first).tolist() != np.array(second).tolist()
    run(engine)
    assert ticket.preview() is None  # a finished ticket holds no device memory


def test_timings_add_up() -> None:
    engine = make(batch_size=1)
    began = time.perf_counter()
    tickets = [engine.submit(ask(seed=seed, hires_scale=1.5, hires_steps=2)) for seed in range(3)]
    submitted, ended = time.perf_counter(), {}
    for ticket in tickets:
        ticket.future.add_done_callback(lambda future: ended.setdefault(future, time.perf_counter()))
    run(engine)
    for ticket in tickets:
        timings = ticket.future.result().timings
        assert list(timings) == ["queue", "prepare", "denoise", "decode"]
        assert min(timings.values()) >= 0.0
        assert sum(timings.values()) <= ended[ticket.future] - began
    assert sum(timings.values()) > 0.5 * (ended[ticket.future] - submitted)


def test_results_say_what_was_made() -> None:
    result = make().generate([ImageRequest(prompt="a fox", steps=1, width=SIDE)])[0]
    made = result.request
    assert (made.height, made.sampler, made.schedule, made.guidance_scale) == (SIDE, "pndm", "leading", 7.5)
    assert content(make().generate([made])[0]) == content(result)


def test_saving(tmp_path: Any) -> None:
    results = make().generate([ask(steps=1), ask(steps=1, output="latents")])
    results[0].save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (SIDE, SIDE)
    with pytest.raises(GenerationError, match="latents"):
        results[1].save(tmp_path / "b.png")


def test_latents_are_ordinary_tensors() -> None:
    latents = make().generate([MIXED[0]])[0].latents
    assert latents is not None
    assert not latents.is_inference()
    latents.requires_grad_().sum().backward()


def test_equal_prompts_are_encoded_once() -> None:
    engine = make()
    cache = engine.model.text.cache
    before = cache.misses
    engine.generate([ask(prompt="one prompt, many seeds", seed=seed, steps=1) for seed in range(5)])
    assert cache.misses - before <= 2  # the prompt, and "" unless it was known


# Refusing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (ask(width=33, height=32), "width"),
        (ask(sampler="nonsense"), "sampler"),
        (ask(schedule="nonsense"), "schedule"),
        (ask(clip_skip=3), "clip_skip"),
        (ask(prompt="fox " * 3000), "prompt"),
        (ask(negative_prompt="fox " * 3000), "negative_prompt"),
        (ask(init_image=source_image(), strength=0.1), "strength"),
        (ask(strength=0.5), "strength"),
        (ask(depth=source_image()), "depth"),
        (ask(init_latents=torch.zeros(1, 4, 4, 4)), "init_latents"),
        (ask(init_latents=torch.zeros(16, 4, 4)), "init_latents"),
        (ask(hires_scale=2.0, hires_strength=0.1), "hires_strength"),
        (ask(width=2048, height=2048, hires_scale=8), "hires_scale"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(bad: ImageRequest, field: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(bad)
    assert caught.value.field == field
    with pytest.raises(InvalidRequest):
        engine.generate([ask(), ask(), bad])
    assert not engine.step()
    assert engine.network.calls == 0


@pytest.mark.parametrize(
    ("kind", "bad", "field"),
    [
        ("depth", ask(init_image=source_image()), "depth"),
        ("depth", ask(), "init_image"),
        ("sd1-inpaint", ask(init_image=source_image()), "mask"),
        ("pix2pix", ask(init_image=source_image(), mask=mask_image()), "mask"),
        ("pix2pix", ask(init_image=source_image(), hires_scale=2.0), "hires_scale"),
        ("upscaler", ask(), "init_image"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(kind: str, bad: ImageRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make(kind).submit(bad)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["batch_size", "rows"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_of_the_engine_itself(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        Engine(oracle.model("sd1"), **{name: value})


# Failing ---------------------------------------------------------------------------------------------------


def truncated(kind: str) -> Image.Image:
    buffer = io.BytesIO()
    source_image(64, 64).save(buffer, kind)
    return Image.open(io.BytesIO(buffer.getvalue()[:700]))


def test_source_that_breaks_off_is_its_own_fault() -> None:
    engine = make()
    tickets = [engine.submit(ask(init_image=truncated("JPEG"))), engine.submit(MIXED[0])]
    run(engine)
    with pytest.raises(GenerationError, match=r"prepare: OSError: .*truncated"):
        tickets[0].future.result(0)
    assert content(tickets[1].future.result(0)) == alone(0)


def test_source_whose_orientation_cannot_be_read_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="init_image: cannot be read"):
        make().submit(ask(init_image=truncated("PNG")))


def test_network_that_makes_nan_of_one_image_spares_the_others() -> None:
    engine = make()
    unet, poison = engine.network.unet, oracle.model("sd1").text.encode("poison").context

    def broken(x: Tensor, times: Tensor, context: Tensor, *rest: Any) -> Tensor:
        out = unet(x, times, context, *rest).clone()
        for row in range(len(x)):
            if torch.equal(context[row], poison):
                out[row] = float("nan")
        return out

    engine.network.unet = broken
    requests = [MIXED[0], ask(prompt="poison", output="latents"), MIXED[1]]
    tickets = [engine.submit(request) for request in requests]
    run(engine)
    with pytest.raises(GenerationError, match="non-finite"):
        tickets[1].future.result(0)
    assert finished([tickets[0], tickets[2]]) == [alone(0), alone(1)]


def cpu_allocation(*_: object) -> Tensor:
    """What torch raises on a CPU."""
    return torch.empty(1 << 60)


def cuda_allocation(*_: object) -> Tensor:
    raise torch.cuda.OutOfMemoryError("out of memory")


def limited(
    engine: Engine, most: list[int], allocate: Callable[..., Tensor] = cuda_allocation
) -> Callable[..., Tensor]:
    """The engine's network on a device with memory for `most[0]` rows."""
    unet = engine.network.unet

    def call(x: Tensor, *rest: Any) -> Tensor:
        if len(x) > most[0]:
            allocate()
        found: Tensor = unet(x, *rest)
        return found

    return call


@pytest.mark.parametrize(("most", "rows"), [(8, 8), (3, 2), slow(5, 4), slow(1, 1)])
def test_out_of_memory_halves_the_rows(most: int, rows: int) -> None:
    engine = make(rows=16)
    engine.network.unet = limited(engine, [most])
    results = engine.generate(MIXED[:5])
    wanted = make(rows=rows).generate(MIXED[:5])
    assert [content(result) for result in results] == [content(result) for result in wanted]
    assert {result.rows for result in results} == {rows}


def test_out_of_memory_of_one_size_halves_no_other_s_rows() -> None:
    engine = make(rows=16)
    unet = engine.network.unet

    def call(x: Tensor, *rest: Any) -> Tensor:
        if len(x) > 4 and x.shape[-1] > 4:
            cuda_allocation()
        found: Tensor = unet(x, *rest)
        return found

    engine.network.unet = call
    large = ask(width=64, steps=2)
    results = engine.generate([large, *MIXED[:2]])
    assert [result.rows for result in results] == [4, 16, 16]
    assert content(results[0]) == content(make(rows=4).generate([large])[0])
    wanted = make(rows=16).generate(MIXED[:2])
    assert [content(result) for result in results[1:]] == [content(result) for result in wanted]


@pytest.mark.parametrize("allocate", [cuda_allocation, cpu_allocation])
def test_out_of_memory_at_one_row_fails_those_images_alone(allocate: Callable[..., Tensor]) -> None:
    engine = make()
    most = [0]
    engine.network.unet = limited(engine, most, allocate)
    tickets = [engine.submit(request) for request in MIXED[:3]]
    run(engine)
    for ticket in tickets:
        with pytest.raises(OutOfMemory, match=r"32x32.*memory"):
            ticket.future.result(0)
    most[0] = 99
    assert oracle.relative(*(e.generate([MIXED[0]])[0].latents for e in (engine, make(rows=1)))) == 0.0


@pytest.mark.parametrize("part", ["decode", "prepare"])
def test_out_of_memory_elsewhere_fails_that_image_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(flight, part)

    def scarce(model: Any, subject: Any, *rest: Any) -> Any:
        big = subject.shape[-1] > 4 if part == "decode" else subject.width > 32
        if big:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(model, subject, *rest)

    monkeypatch.setattr(flight, part, scarce)
    engine = make()
    tickets = [engine.submit(ask(width=64, steps=1)), engine.submit(MIXED[0])]
    run(engine)
    with pytest.raises(OutOfMemory, match=r"64x32.*memory"):
        tickets[0].future.result(0)
    assert content(tickets[1].future.result(0)) == alone(0)


def explode(*_: Any) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_network_that_raises_fails_everything_and_the_engine() -> None:
    engine = make(batch_size=2)
    tickets = [engine.submit(ask(seed=seed, width=SIDE * (1 + seed % 2))) for seed in range(7)]
    engine.step()
    engine.network.unet = explode
    with pytest.raises(GenerationError, match="illegal memory access"):
        run(engine)
    for ticket in tickets:
        with pytest.raises(GenerationError, match="illegal memory access"):
            ticket.future.result(0)
    with pytest.raises(GenerationError, match="closed"):
        engine.submit(ask())
    with pytest.raises(GenerationError, match="closed"):
        engine.generate([ask()])
    assert isinstance(engine.failure, RuntimeError)
    assert not engine.step()
    engine.close()


def test_generate_with_a_network_that_raises() -> None:
    engine = make()
    engine.network.unet = explode
    with pytest.raises(GenerationError, match="illegal memory access"):
        engine.generate([ask(), ask()])
    assert not engine._busy()


def test_decoder_that_breaks_the_device_fails_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the image that was in its hands."""
    monkeypatch.setattr(flight, "decode", explode)
    engine = make()
    tickets = [engine.submit(ask(seed=seed, steps=1 + seed)) for seed in range(3)]
    with pytest.raises(GenerationError):
        run(engine)
    assert all(isinstance(ticket.future.exception(0), GenerationError) for ticket in tickets)


def test_background_thread_with_a_network_that_raises() -> None:
    engine = make(batch_size=1)
    engine.network.unet = explode
    tickets = [engine.submit(ask(seed=seed)) for seed in range(3)]
    with engine:
        for ticket in tickets:
            with pytest.raises(GenerationError, match="illegal memory access"):
                ticket.future.result(WAIT)
        with pytest.raises(GenerationError):
            engine.generate([ask()])


def test_interrupted_generate_leaves_an_engine_that_works() -> None:
    engine = make(batch_size=2)
    unet, calls = engine.network.unet, [0]

    def interrupted(*arguments: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        found: Tensor = unet(*arguments)
        return found

    engine.network.unet = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask(seed=seed) for seed in range(4)])
    calls_before = engine.network.calls
    assert content(engine.generate([MIXED[0]])[0]) == alone(0)
    assert engine.network.calls - calls_before == 3  # nothing of the interrupted images was left


def test_one_failure_is_raised_after_all_others_finished() -> None:
    with make() as engine:
        unet, poison = engine.network.unet, engine.model.text.encode("poison").context

        def broken(x: Tensor, times: Tensor, context: Tensor, *rest: Any) -> Tensor:
            bad = torch.tensor([torch.equal(row, poison) for row in context])[:, None, None, None]
            return torch.where(bad, torch.nan, unet(x, times, context, *rest))

        engine.network.unet = broken
        tickets: list[Ticket] = []
        submit = engine._queue.enter

        def watched(several: list[Ticket]) -> None:
            tickets.extend(several)
            submit(several)

        engine._queue.enter = watched  # type: ignore[method-assign]
        with pytest.raises(GenerationError, match="non-finite"):
            engine.generate([ask(prompt="poison", steps=1), ask(steps=8), ask(steps=6)])
        assert [ticket.future.done() for ticket in tickets] == [True] * 3


# Closing ---------------------------------------------------------------------------------------------------


def test_closing_finishes_what_was_submitted() -> None:
    engine = make(batch_size=2).start()
    tickets = [engine.submit(request) for request in MIXED[:5]]
    engine.close()
    assert finished(tickets) == [alone(index) for index in range(5)]
    for late in (lambda: engine.submit(ask()), lambda: engine.generate([ask()]), engine.start):
        with pytest.raises(GenerationError, match="closed"):
            late()
    engine.close()


def test_closing_an_engine_that_was_not_started() -> None:
    engine = make(batch_size=2)
    tickets = [engine.submit(request) for request in MIXED[:3]]
    engine.close()
    assert finished(tickets) == [alone(index) for index in range(3)]


def test_leaving_with_an_error_cancels() -> None:
    tickets: list[Ticket] = []

    def leave() -> None:
        with make(batch_size=1) as engine:
            tickets.extend(engine.submit(ask(steps=1000, seed=seed)) for seed in range(4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert all(isinstance(ticket.future.exception(0), Cancelled) for ticket in tickets)


def test_closing_from_a_callback_does_not_lock_up() -> None:
    engine = make().start()
    ticket = engine.submit(ask(steps=1))
    ticket.future.add_done_callback(lambda _: engine.close())
    ticket.future.result(WAIT)
    engine.close()


def test_idle_engine_wakes_up() -> None:
    with make() as engine:
        for index in (0, 1):
            assert content(engine.submit(MIXED[index]).future.result(WAIT)) == alone(index)
            time.sleep(0.05)


# Fairness --------------------------------------------------------------------------------------------------


def test_small_buckets_do_not_starve() -> None:
    engine = make(batch_size=4)
    crowd = [engine.submit(ask(seed=seed, steps=60, guidance_scale=1.0)) for seed in range(4)]
    single = engine.submit(ask(width=64, steps=3, guidance_scale=1.0))
    ticks = 0
    while not single.future.done():
        engine.step()
        ticks += 1
    assert ticks <= 3 * (flight.STARVATION + 2) + 2
    assert all(ticket.step > 2 * single.steps for ticket in crowd)
    for ticket in crowd:
        ticket.cancel()
    run(engine)


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_the_bucket_is_known_before_anything_is_prepared(index: int) -> None:
    for fields in ({}, {"prompt": "word " * 100}, {"negative_prompt": "word " * 200, "guidance_scale": 1.0}):
        request = replace(MIXED[index], **fields)
        model = oracle.model("sd1")
        resolved, _, bucket = checked(model, request)
        assert prepare(model, resolved).bucket == bucket


def test_a_newcomer_gets_the_first_place_that_a_flood_leaves() -> None:
    """Nothing of the flood was prepared ahead of it: it waits for one image of the batch and for no other."""
    engine = make(batch_size=2)
    flood = [engine.submit(ask(seed=seed, steps=4), client="flood") for seed in range(12)]
    for _ in range(2):
        engine.step()
    newcomer = engine.submit(ask(seed=99, steps=4), client="new")
    while not newcomer.future.done():
        engine.step()
    assert content(newcomer.future.result(0)) == content(make().generate([ask(seed=99, steps=4)])[0])
    begun = [ticket for ticket in flood if ticket.step]
    assert len(begun) <= 4, "the first two, one beside the newcomer, and its successor"
    run(engine)
    assert all(ticket.future.done() for ticket in flood)


def test_a_full_bucket_does_not_keep_other_sizes_out() -> None:
    engine = make(batch_size=2)
    flood = [engine.submit(ask(seed=seed, steps=30), client="flood") for seed in range(12)]
    late = engine.submit(ask(width=2 * SIDE, steps=2), client="flood")
    for _ in range(flight.STARVATION + 4):
        engine.step()
    assert late.step >= 1
    assert sum(ticket.step > 0 for ticket in flood) == 2
    for ticket in flood:
        ticket.cancel()
    run(engine)
    assert late.future.done()


def test_many_buckets_all_move() -> None:
    """More shapes than the starvation limit, one of them crowded."""
    engine = make(batch_size=8, rows=1)
    sizes = [(8 * w, 8 * h) for w in (1, 2, 3, 4) for h in (1, 2, 3)][: flight.STARVATION + 3]
    crowd = [(48, 48)] * 4
    tickets = [
        engine.submit(ask(width=w, height=h, steps=40, guidance_scale=1.0, seed=n))
        for n, (w, h) in enumerate(crowd + sizes)
    ]
    for _ in range(3 * (len(sizes) + 1)):
        engine.step()
    assert min(ticket.step for ticket in tickets) >= 2
    for ticket in tickets:
        ticket.cancel()
    run(engine)


@pytest.mark.parametrize("slow", ["advance", "decode"])
def test_those_that_end_together_neither_wait_for_each_other_nor_hold_up_others(
    monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """A tick decodes for as long as its step took: quick pictures all at once, slow ones one by one."""
    real, clock = getattr(flight, slow), [0.0]

    def slowly(*arguments: Any) -> Any:
        clock[0] += 0.2
        return real(*arguments)

    monkeypatch.setattr(flight, slow, slowly)
    monkeypatch.setattr(flight.time, "perf_counter", lambda: clock[0])
    engine = make()
    together = [engine.submit(ask(seed=seed, steps=2)) for seed in range(6)]
    long = engine.submit(ask(steps=10))
    most = 0
    while not long.future.done():
        done, at = sum(ticket.future.done() for ticket in together), long.step
        engine.step()
        most = max(most, sum(ticket.future.done() for ticket in together) - done)
        assert long.step == at + 1 or at == long.steps
    assert all(ticket.future.done() for ticket in together)
    assert most == (1 if slow == "decode" else 6)


def test_images_of_one_step_do_not_pile_up_and_stay_together() -> None:
    engine = make(batch_size=4, rows=4)
    tickets = [engine.submit(ask(seed=seed, steps=1, guidance_scale=1.0)) for seed in range(40)]
    most = 0
    while engine.step():
        most = max(most, len(engine._flight._finished))
    assert all(ticket.future.done() for ticket in tickets)
    assert most <= 2 * engine.batch_size
    assert engine.network.calls <= 12  # ten full batches


# On an accelerator -----------------------------------------------------------------------------------------

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_cuda = pytest.mark.parametrize("dtype", [pytest.param(d, marks=cuda) for d in ("float32", "bfloat16")])


@functools.cache
def cuda_model(dtype: str, kind: str = "sd1") -> Any:
    from diffray.model import load_model

    return load_model(str(oracle.folder(kind)), device="cuda", dtype=dtype)


@on_cuda
@pytest.mark.parametrize("index", range(7))
def test_cuda_parity(index: int, dtype: str) -> None:
    result = Engine(cuda_model(dtype), batch_size=BATCH).generate([MIXED[index]])[0]
    assert result.latents is not None
    wanted = torch.frombuffer(bytearray(alone(index)), dtype=torch.float32).view(result.latents.shape)
    assert oracle.relative(result.latents, wanted) < (1e-3 if dtype == "float32" else 0.2)


@on_cuda
def test_cuda_invariance(dtype: str) -> None:
    """Alone, in batches, in every order, joined late, beside cancelled ones."""
    model = cuda_model(dtype)
    requests = MIXED + OTHERS
    wanted = [content(Engine(model, batch_size=BATCH).generate([request])[0]) for request in requests]
    for order in (requests, requests[::-1]):
        results = Engine(model, batch_size=BATCH).generate(order)
        got = [content(result) for result in results]
        assert (got if order is requests else got[::-1]) == wanted
    for late in range(1, 5):
        engine = Engine(model, batch_size=BATCH)
        others = [engine.submit(ask(seed=n, steps=6, output="latents")) for n in range(3)]
        for _ in range(late):
            engine.step()
        ticket = engine.submit(MIXED[0])
        others[1].cancel()
        run(engine)
        assert content(ticket.future.result(0)) == wanted[0]
