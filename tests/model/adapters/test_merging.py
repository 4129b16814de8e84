"""Merged weights: what they are, that the checkpoint's own come back, and who may use them when."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffray.model import Engine, GenerationError, ImageRequest, InvalidRequest, Model, load_model
from diffray.model.adapters import adapter as adapter_module
from diffray.model.adapters.adapter import Loaded
from diffray.model.adapters.choices import adapter_choices
from diffray.model.adapters.merging import Adapters, Merged

from .. import oracle
from . import files

ASK: dict[str, Any] = {"steps": 2, "width": oracle.SIDE, "height": oracle.SIDE}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    everything = (*files.LINEAR, *files.CONVOLUTIONS)
    return {
        "one": files.write(folder / "one.safetensors", "sd1", endings=everything),
        "two": files.write(folder / "two.safetensors", "sd1", "peft", seed=1),
        "attention": files.write(folder / "attention.safetensors", "sd1", "old", seed=2),
    }


@pytest.fixture
def model(sources: dict[str, str]) -> Model:
    return load_model(str(oracle.folder("sd1")), device="cpu", dtype="float32", adapters=sources)


def digest(model: Model) -> str:
    """Of every parameter of every network, bit for bit."""
    state = hashlib.sha256()
    for network in (model.unet, model.text, model.vae):
        for name, tensor in sorted(network.state_dict().items()):
            state.update(name.encode() + _bytes(tensor))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def merged(model: Model, adapters: str) -> dict[str, Tensor]:
    """A copy of the UNet's parameters with these adapters."""
    with model.adapters.in_unet(model.adapters.of_unet(tuple(sorted(adapter_choices(adapters))))):
        return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


def test_packed_projections_change_by_rows(model: Model, sources: dict[str, str]) -> None:
    """By hand: query, key and value of one attention are rows of one matrix."""
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    before = model.unet.state_dict()[f"{block}.to_qkv.weight"].clone()
    own = load_file(sources["attention"])
    pairs = [[own[f"unet.{block}.processor.to_{x}_lora.{y}.weight"] for y in ("up", "down")] for x in "qkv"]
    wanted = before + 0.5 * torch.cat([up @ down for up, down in pairs])
    torch.testing.assert_close(merged(model, "attention:0.5")[f"{block}.to_qkv.weight"], wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_base_weights_come_back_bit_for_bit(dtype: str, sources: dict[str, str]) -> None:
    model = load_model(str(oracle.folder("sd1")), device="cpu", dtype=dtype, adapters=sources)
    before = digest(model)
    for adapters in ("one", "two:-2,one:3", "attention"):
        merged(model, adapters)
        assert digest(model) != before
    merged(model, "")
    assert digest(model) == before
    assert model.adapters.bytes == sum(
        change.bytes for own in model.adapters._factors.values() for change in own.values()
    )


def test_half_precision_is_rounded_once(sources: dict[str, str]) -> None:
    """Two changes are added in float32 to the kept base, not to what was rounded before."""
    exact = load_model(str(oracle.folder("sd1")), device="cpu", dtype="float32", adapters=sources)
    half = load_model(str(oracle.folder("sd1")), device="cpu", dtype="bfloat16", adapters=sources)
    name = "mid_block.attentions.0.proj_in.weight"
    with torch.no_grad():
        exact.unet.get_parameter(name).copy_(half.unet.get_parameter(name))
    wanted = merged(exact, "one,two:0.3")[name]
    assert torch.equal(merged(half, "one,two:0.3")[name], wanted.to(torch.bfloat16))


def test_weights_do_not_depend_on_what_was_merged_before(model: Model) -> None:
    fresh = merged(model, "one:0.4,two")
    for before in ("two", "attention,one", "", "two,one:0.4"):
        merged(model, before)
        again = merged(model, "one:0.4,two")
        assert all(torch.equal(again[name], tensor) for name, tensor in fresh.items())


def test_only_what_is_touched_is_kept(model: Model) -> None:
    adapters = model.adapters
    merged(model, "one")
    whole = adapters._unet.bytes
    merged(model, "attention")
    attention = [p for n, p in model.unet.named_parameters() if ".to_" in n and n.endswith(".weight")]
    assert adapters._unet.bytes == sum(p.nbytes for p in attention) < whole
    merged(model, "")
    assert adapters._unet.bytes == 0


def test_a_failure_while_merging_leaves_the_base_weights(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = digest(model), []

    def fails(self: Loaded, tensor: str, base: Tensor) -> Tensor:
        calls.append(tensor)
        if len(calls) == 20:
            raise torch.cuda.OutOfMemoryError("no more")
        return torch.ones_like(base)

    merged(model, "two")
    monkeypatch.setattr(Loaded, "of", fails)
    engine = Engine(model, batch_size=1)
    with pytest.raises(GenerationError, match="no more"):
        engine.generate([ImageRequest(adapters="one", **ASK)])
    assert len(calls) == 20
    model.adapters._text.restore()
    assert digest(model) == before
    monkeypatch.undo()
    assert engine.generate([ImageRequest(adapters="one", **ASK)])[0].image is not None  # the engine lives


def test_closing_an_engine_leaves_the_base_weights(model: Model) -> None:
    before = digest(model)
    with Engine(model, batch_size=2) as engine:
        engine.generate([ImageRequest(adapters=own, **ASK) for own in ("one", "two")])
        assert digest(model) != before
    assert digest(model) == before


def test_unknown_names_are_refused(model: Model) -> None:
    engine = Engine(model)
    for adapters in ("one,missing", "missing:0"):
        with pytest.raises(
            InvalidRequest, match="adapters: got 'missing', allowed is one of attention, one, two"
        ):
            engine.submit(ImageRequest(adapters=adapters, **ASK))
    bare = Engine(oracle.model("sd1"))
    with pytest.raises(InvalidRequest, match="this model has no adapters"):
        bare.submit(ImageRequest(adapters="one", **ASK))


def test_factors_are_read_once_while_they_fit(
    model: Model, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = adapter_module.Adapter.read
    monkeypatch.setattr(adapter_module.Adapter, "read", lambda self: (reads.append(self.name), read(self))[1])
    own = model.adapters
    for adapters in ("one", "two", "one", "two,one"):
        merged(model, adapters)
    assert reads == ["one", "two"]
    own.restore()
    small = Adapters(own._adapters, model.unet, model.text, ["text_encoder"], factor_bytes=1)
    model.adapters = small
    wanted = merged(model, "one,two")
    assert len(small._factors) == 1
    assert reads[2:] == ["one", "two"]
    merged(model, "")
    small.restore()
    model.adapters = own
    again = merged(model, "one,two")
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())


def test_the_text_cache_tells_sets_apart(model: Model) -> None:
    text = model.text
    plain = text.encode("a red fox").context
    one = text.encode("a red fox", 0, adapter_choices("one")).context
    assert not torch.equal(plain, one)
    hits = text.cache.hits
    assert torch.equal(text.encode("a red fox").context, plain)
    assert torch.equal(text.encode("a red fox", 0, adapter_choices("one")).context, one)
    assert text.cache.hits == hits + 2
    text.cache.clear()
    assert torch.equal(text.encode("a red fox").context, plain)


def test_two_engines_on_one_model(model: Model) -> None:
    """Each has the weights it asked for, whatever the other does at that time."""
    asked = [
        [ImageRequest(seed=seed, adapters=own, **ASK) for seed in range(4)] for own in ("one", "two:0.5")
    ]
    wanted = [
        [r.image.tobytes() for r in Engine(model, batch_size=2).generate(own) if r.image] for own in asked
    ]
    found: dict[int, list[bytes]] = {}

    def work(index: int) -> None:
        results = Engine(model, batch_size=2).generate(asked[index])
        found[index] = [r.image.tobytes() for r in results if r.image]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == wanted


@pytest.fixture
def switches(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the UNet was merged with in turn."""
    found: list[Any] = []
    become = Merged.become

    def counted(self: Any, choices: Any, loaded: Any) -> None:
        if self is model.adapters._unet:
            found.append(choices)
        become(self, choices, loaded)

    monkeypatch.setattr(Merged, "become", counted)
    return found


def test_the_merged_bucket_goes_first_among_equals(model: Model, switches: list[Any]) -> None:
    """Two sets that are equally full do not take turns: each switch costs a merge."""
    engine = Engine(model, batch_size=2)
    engine.generate(
        [ImageRequest(adapters=own, **ASK | {"steps": 6}) for own in ("one", "two", "two", "one")]
    )
    assert len(switches) <= 3


def test_many_sets_of_one_image_take_long_turns(model: Model, switches: list[Any]) -> None:
    """All starve; with a turn per tick there would be 12 x 10 merges."""
    asked = [ImageRequest(adapters=f"one:{(n + 1) / 4}", **ASK | {"steps": 10}) for n in range(12)]
    engine = Engine(model, batch_size=8)
    tickets = [engine.submit(request) for request in asked]
    while engine.step():
        pass
    assert all(ticket.future.result(0).image for ticket in tickets)
    assert len(switches) <= 3 * 12


def test_one_image_of_a_set_does_not_slow_down_many_of_another(model: Model, switches: list[Any]) -> None:
    """It gets a tick when it starves, no more, and is not forgotten."""
    engine = Engine(model, batch_size=8)
    many = [engine.submit(ImageRequest(seed=n, adapters="one", **ASK | {"steps": 40})) for n in range(8)]
    lone = engine.submit(ImageRequest(adapters="two", **ASK | {"steps": 40}))
    for _ in range(45):
        engine.step()
    assert all(ticket.step > 35 for ticket in many)
    assert 3 <= lone.step <= 6


def test_engines_that_wait_for_a_broken_one_go_on(model: Model, tmp_path: Path) -> None:
    """The lock on the weights is freed by whatever ends a step."""
    engine = Engine(model, batch_size=1)

    def dies(*args: Any) -> Tensor:
        raise RuntimeError("no")

    engine.network.unet = dies
    with pytest.raises(GenerationError):
        engine.generate([ImageRequest(adapters="one", **ASK)])
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(Engine(model, batch_size=1).generate([ImageRequest(**ASK)]))
    )
    thread.start()
    thread.join(60)
    assert done[0][0].image.tobytes() == oracle.picture(oracle.model("sd1"), **ASK, prompt="").tobytes()
