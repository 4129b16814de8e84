"""Text towers against diffusers' own prompt encoding and against transformers' full forward pass."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffray.model.config import TextConfig
from diffray.model.errors import CheckpointError, InvalidRequest
from diffray.model.networks.text import Encoded, TextEncoder, build_tower, emphasise, hf_config, tower_key
from diffray.model.networks.tokenizer import BOS, EOS, ClipTokenizer
from diffray.model.prompt import chunk

PROMPTS = ["a photo of a cat", "", "Red, green; and the 7 dwarfs", "in " * 80]
LONG = "one two three, four five six " * 15  # several chunks in any vocabulary here


@cache
def tokenizer() -> ClipTokenizer:
    """All bytes and the first 200 of OpenAI's merges: 714 ids, as small as the embedded model's."""
    full = ClipTokenizer.openai()
    names = sorted(full.vocab, key=full.vocab.__getitem__)[:712]
    vocab = {name: i for i, name in enumerate([*names, BOS, EOS])}
    return ClipTokenizer.from_files(vocab, full.files()["merges.txt"].split("\n")[:201])


BASE = TextConfig(
    hidden=32,
    layers=3,
    heads=4,
    intermediate=48,
    positions=77,
    vocab=720,
    activation="quick_gelu",
    projection_dim=None,
    layer=0,
    final_norm=True,
    pad_id=713,
    bos_id=712,
    eos_id=713,
)
BIG = replace(
    BASE, hidden=48, layers=4, activation="gelu", projection_dim=24, layer=1, final_norm=False, pad_id=0
)
FAMILIES = {
    "sd1": (BASE,),
    "sd2": (replace(BASE, activation="gelu", pad_id=0),),
    "sdxl": (replace(BASE, layer=1, final_norm=False), BIG),
    "refiner": (BIG,),
}


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every block, norm and token matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if "embedding" in name else 0.2
        parameter.data = noise * scale + (1 if "norm" in name and name.endswith("weight") else 0)
    return module.eval().requires_grad_(False)


@cache
def oracle_towers(family: str) -> list[nn.Module]:
    """transformers' models as checkpoints describe them: with the wrong eos id 2 of all Stable Diffusions."""
    towers = []
    for index, config in enumerate(FAMILIES[family]):
        described = CLIPTextConfig(**{**hf_config(config).to_dict(), "eos_token_id": 2, "bos_token_id": 0})
        kind = CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection
        towers.append(randomise(kind(described), seed=index))
    return towers


@cache
def encoder(family: str) -> TextEncoder:
    """Ours, filled from the oracle's weights through `tower_key`."""
    return fill(TextEncoder(FAMILIES[family], [tokenizer()] * len(FAMILIES[family])), family).eval()


def fill(ours: TextEncoder, family: str) -> TextEncoder:
    for tower, theirs, config in zip(ours.towers, oracle_towers(family), FAMILIES[family], strict=True):
        state = {tower_key(name, config): value for name, value in theirs.state_dict().items()}
        tower.load_state_dict(state, strict=True, assign=True)
    return ours


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """diffusers pipelines around the oracle towers; their image networks only have to exist."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)

    def make(family: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        tokenizers = []
        for config in FAMILIES[family]:
            folder = tmp_path_factory.mktemp(family)
            for name, content in tokenizer().files(config.pad_id).items():
                (folder / name).write_text(content, encoding="utf-8")
            tokenizers.append(CLIPTokenizer.from_pretrained(folder))
        towers = oracle_towers(family)
        parts = {"unet": unet, "vae": vae, "scheduler": EulerDiscreteScheduler()}
        if family in ("sd1", "sd2"):
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(text_encoder=towers[0], tokenizer=tokenizers[0], **parts, **none)
        first = (None, None) if family == "refiner" else (towers[0], tokenizers[0])
        return StableDiffusionXLPipeline(
            text_encoder=first[0],
            tokenizer=first[1],
            text_encoder_2=towers[-1],
            tokenizer_2=tokenizers[-1],
            add_watermarker=False,
            **parts,
        )

    return {family: make(family) for family in FAMILIES}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same(one: Encoded, other: Encoded) -> None:
    """Bit for bit."""
    assert torch.equal(one.context, other.context)
    assert one.chunks == other.chunks
    assert one.pooled is other.pooled is None or torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_diffusers(pipelines, family, prompt):
    """Positive and really encoded negative prompt; diffusers truncates where diffray makes another chunk."""
    ours = encoder(family).encode(prompt)
    if family in ("sd1", "sd2"):
        negative, positive = reversed(
            pipelines[family].encode_prompt("x", "cpu", 1, True, negative_prompt=prompt)
        )
        positive, _ = pipelines[family].encode_prompt(prompt, "cpu", 1, True, negative_prompt="x")
        pooled, negative_pooled = None, None
    else:
        positive, _, pooled, _ = pipelines[family].encode_prompt(prompt, negative_prompt="x")
        _, negative, _, negative_pooled = pipelines[family].encode_prompt("x", negative_prompt=prompt)
    for context, projected in ((positive, pooled), (negative, negative_pooled)):
        assert context.shape == (1, 77, encoder(family).context_dim)
        close(ours.context[:77], context[0])
        if projected is None:
            assert ours.pooled is None
        else:
            close(ours.pooled, projected[0])


def test_absent_negative_as_diffusers(pipelines):
    _, context, _, pooled = pipelines["sdxl"].encode_prompt("a cat", negative_prompt=None)
    ours = encoder("sdxl").zeros()
    assert torch.equal(ours.context, context[0])
    assert torch.equal(ours.pooled, pooled[0])
    assert encoder("sdxl").zeros(3).context.shape == (231, 80)
    assert encoder("sd1").zeros().pooled is None


def hidden_states(family: str, prompt: str) -> list[tuple[Tensor, ...]]:
    """transformers' states after each block for the first chunk of `prompt`, per tower, before any norm."""
    states = []
    for tower, config in zip(oracle_towers(family), FAMILIES[family], strict=True):
        ids = torch.tensor([chunk(tokenizer(), prompt, pad_id=config.pad_id)[0].ids])
        states.append(tower(input_ids=ids, output_hidden_states=True).hidden_states)
    return states


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_clip_skip(family, skip):
    expected = []
    states = hidden_states(family, "a photo of a cat")
    for tower, config, own in zip(oracle_towers(family), FAMILIES[family], states, strict=True):
        state = own[-1 - config.layer - skip][0]
        body = getattr(tower, "text_model", tower)
        expected.append(body.final_layer_norm(state) if config.final_norm else state)
    ours = encoder(family).encode("a photo of a cat", clip_skip=skip)
    close(ours.context, torch.cat(expected, dim=-1))
    if ours.pooled is not None:
        assert torch.equal(ours.pooled, encoder(family).encode("a photo of a cat").pooled)


def test_clip_skip_range():
    encoder("sd1").encode("a", clip_skip=2)
    with pytest.raises(InvalidRequest, match=r"clip_skip: got 3, .* 0\.\.2"):
        encoder("sd1").encode("a", clip_skip=3)
    with pytest.raises(InvalidRequest, match=r"clip_skip: got 2, .* 0\.\.1"):
        encoder("sdxl").encode("a", clip_skip=2)
    with pytest.raises(InvalidRequest, match="clip_skip: got -1"):
        encoder("sdxl").encode("a", clip_skip=-1)


def test_only_used_blocks_run():
    ours = fill(TextEncoder(FAMILIES["sdxl"], [tokenizer()] * 2), "sdxl")
    runs: dict[str, int] = {}
    for name, module in ours.named_modules():
        if type(module).__name__ == "CLIPEncoderLayer":
            module.register_forward_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    ours.encode("a BREAK b")
    first = {f"towers.0.encoder.layers.{i}": 2 for i in range(2)}
    second = {f"towers.1.text_model.encoder.layers.{i}": 2 for i in range(3)}
    # The last block only feeds pooled, which is the first chunk's.
    assert runs == {**first, **second, "towers.1.text_model.encoder.layers.3": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_chunk_is_encoded_alone(family):
    ours = encoder(family)
    whole = ours.encode("a red cat BREAK BREAK and the end")
    parts = [ours.encode(text) for text in ("a red cat", "", "and the end")]
    assert whole.chunks == 3
    assert torch.equal(whole.context, torch.cat([part.context for part in parts]))
    assert whole.pooled is parts[0].pooled is None or torch.equal(whole.pooled, parts[0].pooled)


def test_long_prompt_is_chunks_of_its_tokens():
    ours = encoder("sdxl")
    whole = ours.encode(LONG)
    chunks = chunk(tokenizer(), LONG, pad_id=0)
    assert whole.chunks == len(chunks) == 4
    assert whole.context.shape == (77 * whole.chunks, 80)
    tower, config = oracle_towers("sdxl")[1], FAMILIES["sdxl"][1]
    for index, one in enumerate(chunks):
        states = tower(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states
        close(whole.context[77 * index : 77 * index + 77, 32:], states[-1 - config.layer][0])


def test_padding_to_more_chunks():
    ours = encoder("sdxl")
    one, empty = ours.encode("a cat"), ours.encode("")
    padded = ours.encode_padded("a cat", 3)
    assert_same(padded, Encoded(torch.cat([one.context, empty.context, empty.context]), one.pooled, 3))
    assert_same(ours.encode_padded("a BREAK b", 1), ours.encode("a BREAK b"))
    skipped = ours.encode_padded("a cat", 2, clip_skip=1)
    assert torch.equal(skipped.context[77:], ours.encode("", clip_skip=1).context)


def test_towers_with_other_vocabularies_stay_aligned():
    """A prompt of one chunk for one tower and two for the other is two for both."""
    full = ClipTokenizer.openai()
    other = replace(BASE, vocab=49408, pad_id=0, bos_id=49406, eos_id=49407)
    ours = TextEncoder((BASE, other), [tokenizer(), full])
    small, large = ours.tokenize("photograph " * 40)
    assert len(chunk(full, "photograph " * 40)) == 1
    assert len(small) == len(large) > 1
    assert large[1].ids[:3] == (49406, 49407, 0)
    assert small[-1].ids[-1] == 713
    assert ours.encode("photograph " * 40).context.shape == (77 * len(small), 64)


def weighted(states: Tensor, weights: list[float]) -> Tensor:
    """The documented rule, in float64."""
    before = states.double()
    after = before * torch.tensor(weights, dtype=torch.float64)[:, None]
    return (after * (before.mean() / after.mean())).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family):
    """Per tower: states times weights, mean of the chunk restored; pooled and other chunks untouched."""
    ours, text = encoder(family), "a (red:1.4) cat [on] the table BREAK dog"
    plain, got = ours.encode("a red cat on the table BREAK dog"), ours.encode(text)
    weights = list(chunk(tokenizer(), text)[0].weights)
    expected, start = [], 0
    for config in FAMILIES[family]:
        expected.append(weighted(plain.context[:77, start : start + config.hidden], weights))
        start += config.hidden
    torch.testing.assert_close(got.context[:77], torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got.context[:77], plain.context[:77], atol=1e-2)
    assert torch.equal(got.context[77:], plain.context[77:])
    assert got.pooled is plain.pooled is None or torch.equal(got.pooled, plain.pooled)


def test_weight_one_changes_no_bit():
    assert torch.equal(encoder("sd1").encode("a (cat:1.0)").context, encoder("sd1").encode("a cat").context)


def test_weighting_can_be_off():
    ours = fill(TextEncoder(FAMILIES["sd1"], [tokenizer()], weighting=False), "sd1")
    (only,) = ours.tokenize("a (cat:1.5) BREAK")[0]
    ids = tokenizer().encode("a (cat:1.5) BREAK")
    assert only.ids[1 : len(ids) + 1] == tuple(ids)
    assert ours.encode("(cat:1.5) BREAK").chunks == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=5, max_size=5), st.integers(0, 10**6))
def test_emphasis_is_finite_and_bounded(weights, seed):
    states = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed))
    got = emphasise(states, torch.tensor([weights]))
    assert got.isfinite().all()
    assert got.abs().max() <= states.abs().max() * 100.01


def test_emphasis_where_the_mean_is_no_guide():
    states = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert torch.equal(
        emphasise(states, torch.tensor([[2.0, 1.0]])), torch.tensor([[[2.0, -2.0], [2.0, -2.0]]])
    )
    flipped = emphasise(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.0, -1.0]]))
    assert torch.equal(flipped, torch.tensor([[[0.1], [-0.2]]]))  # not the negative scale 1.5 / -0.5
    half = torch.randn(2, 3, 8).bfloat16()
    assert torch.equal(emphasise(half, torch.ones(2, 3)), half)


def test_emphasis_is_per_chunk():
    states = torch.randn(2, 6, 8) + 1
    weights = torch.tensor([[1, 1.5, 1.5, 1, 1, 1], [1, 0.5, 1, 1, 1, 1]])
    together = emphasise(states, weights)
    torch.testing.assert_close(together.mean(dim=(1, 2)), states.mean(dim=(1, 2)))
    for row in range(2):
        assert torch.equal(together[row : row + 1], emphasise(states[row : row + 1], weights[row : row + 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_result_depends_on_the_prompt_alone(family):
    """Other prompts, their order and the cache change no bit."""
    prompts = ["a cat", LONG, "", "(a:1.3) dog", "a BREAK b"]
    configs = FAMILIES[family]
    fresh = [
        fill(TextEncoder(configs, [tokenizer()] * len(configs)), family).encode(prompt) for prompt in prompts
    ]
    uncached = fill(TextEncoder(configs, [tokenizer()] * len(configs), cache_chunks=0), family)
    for prompt, alone in reversed(list(zip(prompts, fresh, strict=True))):
        assert_same(encoder(family).encode(prompt), alone)
        assert_same(uncached.encode(prompt), alone)


def test_forward_takes_batches():
    """What training uses: many chunks at once, with gradients, the same numbers as `encode`."""
    ours = fill(TextEncoder(FAMILIES["sdxl"], [tokenizer()] * 2), "sdxl").requires_grad_(True)
    prompts = ["a (cat:1.5)", "a dog", ""]
    towers = list(zip(*(ours.tokenize(prompt) for prompt in prompts), strict=True))
    ids = torch.tensor([[own[0].ids for own in tower] for tower in towers])
    weights = torch.tensor([[own[0].weights for own in tower] for tower in towers])
    context, pooled = ours(ids, weights)
    assert context.requires_grad
    assert pooled.requires_grad
    for row, prompt in enumerate(prompts):
        encoded = ours.encode(prompt)
        close(context[row].detach(), encoded.context)
        close(pooled[row].detach(), encoded.pooled)
        assert not encoded.context.requires_grad


def test_pooling_ignores_learned_tokens():
    """A textual-inversion id above end-of-text is not where transformers' argmax would look."""
    ours, tower = encoder("refiner"), oracle_towers("refiner")[0]
    ids = torch.full((1, 77), 0)
    ids[0, :5] = torch.tensor([712, 719, 300, 713, 713])
    state = tower(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    expected = tower.text_projection(tower.text_model.final_layer_norm(state[:, 3]))
    _, pooled = ours(ids[None])
    close(pooled, expected)
    assert not torch.allclose(pooled, tower(input_ids=ids).text_embeds, atol=1e-2)


def test_cache_encodes_equal_prompts_once():
    ours = fill(TextEncoder(FAMILIES["sd1"], [tokenizer()], cache_chunks=4), "sd1")
    first = ours.encode("a")
    assert ours.encode("a") is first
    assert ours.encode("a", clip_skip=1) is not first
    assert (ours.cache.hits, ours.cache.misses, len(ours.cache)) == (1, 2, 2)
    ours.encode("a BREAK b")  # 2 chunks: 4 in all, full
    ours.encode("a")  # now younger than clip_skip=1
    ours.encode("c")
    assert len(ours.cache) == 3
    hits = ours.cache.hits
    ours.encode("a"), ours.encode("a BREAK b"), ours.encode("c")
    assert ours.cache.hits == hits + 3
    ours.encode("d BREAK " * 4 + "e")  # 5 chunks never fit
    assert len(ours.cache) == 0
    with pytest.raises(InvalidRequest):
        ours.encode("x BREAK " * 40)
    assert len(ours.cache) == 0


def test_cache_follows_the_weights():
    ours = fill(TextEncoder(FAMILIES["sdxl"], [tokenizer()] * 2), "sdxl")
    full = ours.encode("a cat")
    copied, loaded = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    assert len(ours.cache) == 1
    assert len(copied.cache) == len(loaded.cache) == 0
    assert_same(loaded.encode("a cat"), full)
    half = copied.bfloat16().encode("a cat")
    assert half.context.dtype == half.pooled.dtype == torch.bfloat16
    torch.testing.assert_close(half.context.float(), full.context, rtol=0.1, atol=0.3)
    assert copied.zeros().context.dtype == torch.bfloat16
    copied.float()
    assert len(copied.cache) == 0


def test_encode_from_threads():
    ours = fill(TextEncoder(FAMILIES["sdxl"], [tokenizer()] * 2, cache_chunks=2), "sdxl")
    prompts = ["a", "b", "c", "d BREAK e"] * 8
    with ThreadPoolExecutor(4) as pool:
        for prompt, encoded in zip(prompts, pool.map(ours.encode, prompts), strict=True):
            assert_same(encoded, encoder("sdxl").encode(prompt))
    assert ours.cache.hits + ours.cache.misses == len(prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_built_on_meta(family):
    """A loader that assigns every parameter leaves nothing on meta."""
    with torch.device("meta"):
        ours = TextEncoder(FAMILIES[family], [tokenizer()] * len(FAMILIES[family]))
    assert {parameter.device.type for parameter in ours.parameters()} == {"meta"}
    assert_same(fill(ours, family).to("cpu").encode("a cat"), encoder(family).encode("a cat"))


@pytest.mark.parametrize("config", [BASE, BIG])
def test_keys_of_both_layouts(config):
    """Every parameter is reached from its name with and without `text_model.`, and never twice."""
    own = set(build_tower(config).state_dict())
    bare = {name.removeprefix("text_model.") for name in own}
    assert {tower_key(name, config) for name in bare} == own
    assert {tower_key(name if "projection" in name else f"text_model.{name}", config) for name in bare} == own


def test_keys_that_fill_nothing():
    for prefix in ("", "text_model."):
        assert tower_key(f"{prefix}embeddings.position_ids", BASE) is None
        assert tower_key(f"{prefix}embeddings.position_ids", BIG) is None
    assert tower_key("text_projection.weight", BASE) is None
    assert tower_key("text_projection.weight", BIG) == "text_projection.weight"
    assert tower_key("logit_scale", BIG) is None
    assert tower_key("encoder.layers.99.bogus", BASE) == "encoder.layers.99.bogus"
    assert tower_key("visual.proj", BIG) not in build_tower(BIG).state_dict()


def test_saved_config_rebuilds_the_tower(tmp_path):
    """What diffray stores beside its weights is a folder that transformers loads."""
    for index, (tower, config) in enumerate(zip(encoder("sdxl").towers, FAMILIES["sdxl"], strict=True)):
        tower.save_pretrained(tmp_path / str(index))
        kind = CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection
        again = kind.from_pretrained(tmp_path / str(index))
        assert again.config.eos_token_id == 713
        ids = torch.tensor([chunk(tokenizer(), "a cat", pad_id=config.pad_id)[0].ids])
        assert torch.equal(again(ids).last_hidden_state, tower(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((), "0 towers"),
        ((BASE, BASE), "2 towers and 1"),
        ((replace(BASE, vocab=713),), "714 ids"),
        ((replace(BASE, pad_id=720),), "pad id 720"),
        ((replace(BASE, eos_id=712),), "begin and end"),
    ],
)
def test_towers_that_do_not_fit(configs, message):
    with pytest.raises(CheckpointError, match=message):
        TextEncoder(configs, [tokenizer()])


def test_towers_of_unequal_length_do_not_fit():
    with pytest.raises(CheckpointError, match="tower 1: got 64 positions, not 77"):
        TextEncoder((BASE, replace(BASE, positions=64)), [tokenizer()] * 2)


def test_too_long_prompt_names_its_field():
    with pytest.raises(InvalidRequest) as caught:
        encoder("sd1").tokenize("a BREAK " * 50, field="negative_prompt")
    assert caught.value.field == "negative_prompt"
