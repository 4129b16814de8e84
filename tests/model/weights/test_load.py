"""Loading: parity with diffusers and transformers, strict accounting, broken files."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffray.model.errors import CheckpointError, UnsafeCheckpoint
from diffray.model.networks.layers import sinusoid
from diffray.model.weights import blueprint
from diffray.model.weights.convert import convert
from diffray.model.weights.load import Model, load_model

from ..checkpoints import edit, unet_config, write_folder

FAMILIES = [
    "sd1",
    "sd1-inpaint",
    "pix2pix",
    "sd2",
    "depth",
    "unclip",
    "x4",
    "sdxl",
    "refiner",
    "ssd",
    "koala",
    "lcm",
]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder and a single file of the same random SD1 and SDXL model; tests copy before they break one."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for family in ("sd1", "sdxl"):
        found[family] = write_folder(root / family, family)
        found[f"{family}.safetensors"] = convert(str(found[family]), root / f"{family}.safetensors")
    return found


@pytest.fixture
def sd1(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the SD1 folder."""
    import shutil

    return Path(shutil.copytree(folders["sd1"], tmp_path / "sd1"))


@pytest.fixture
def single(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the SD1 file."""
    target = tmp_path / "sd1.safetensors"
    target.write_bytes(folders["sd1.safetensors"].read_bytes())
    return target


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


# Parity ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_unet(model: Model, folder: Path, family: str) -> None:
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    config, generator = model.unet.config, torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, context, timesteps = (
        randn(2, config.in_channels, 8, 12),
        randn(2, 7, config.context_dim),
        torch.tensor([10.0, 500.0]),
    )
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if config.added_kind == "text_time":
        ids = 500 * torch.rand(2, 5 if family == "refiner" else 6, generator=generator)
        pooled = randn(2, 32)
        ours["added"] = torch.cat([pooled, sinusoid(ids.flatten(), 8).view(2, -1)], dim=1)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    elif config.added_kind == "projection":
        ours["added"] = theirs["class_labels"] = randn(2, config.added_dim or 0)
    elif config.class_count is not None:
        ours["class_labels"] = theirs["class_labels"] = torch.tensor([20, 350])
    if config.guidance_dim is not None:
        ours["guidance"] = theirs["timestep_cond"] = randn(2, config.guidance_dim)
    close(model.unet(x, timesteps, context, **ours), reference(x, timesteps, context, **theirs).sample)


@torch.no_grad()
def check_vae(model: Model, folder: Path) -> None:
    reference = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    scale = reference.config.scaling_factor
    latents = reference.encode(images).latent_dist.mode() * scale
    close(model.vae.encode(images), latents)
    close(model.vae.decode(latents), reference.decode(latents / scale).sample)


@torch.no_grad()
def check_text(model: Model, folder: Path) -> None:
    towers = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if (folder / name).exists():
            towers.append(kind.from_pretrained(folder / name).eval())
    chunks = model.text.tokenize("a red cat")
    ids = torch.tensor([[own.ids for own in chunk] for chunk in chunks])
    context, pooled = model.text(ids)
    states = [tower(row, output_hidden_states=True) for tower, row in zip(towers, ids, strict=True)]
    if model.config.family in ("sdxl", "sdxl-refiner"):
        close(context, torch.cat([state.hidden_states[-2] for state in states], dim=-1))
        close(pooled, states[-1].text_embeds)
    else:
        close(context, states[0].last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_agree_with_the_reference_modules(family: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", family)
    single = convert(str(folder), tmp_path / "model.safetensors")
    for source in (folder, single):
        model = load_model(str(source))
        check_unet(model, folder, family)
        check_vae(model, folder)
        check_text(model, folder)


def test_vae_folder_with_the_attention_names_of_old(sd1: Path) -> None:
    wanted = load_model(str(sd1)).vae.state_dict()
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            for new, legacy in old.items():
                if f"attentions.0.{new}" in key:
                    tensors[key.replace(new, legacy)] = tensors.pop(key)

    edit(sd1 / "vae" / WEIGHTS, rename)
    model = load_model(str(sd1))
    assert all(torch.equal(wanted[key], value) for key, value in model.vae.state_dict().items())
    check_vae(model, sd1)


def test_text_names_with_and_without_their_prefix(sd1: Path) -> None:
    wanted = load_model(str(sd1)).text.state_dict()

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            bare = key.removeprefix("text_model.")
            tensors[bare if bare != key else f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None].half()

    edit(sd1 / "text_encoder" / "model.safetensors", flip)
    got = load_model(str(sd1)).text.state_dict()
    assert all(torch.equal(wanted[key], value) for key, value in got.items())


def test_what_load_model_promises(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["sdxl"]), dtype="bfloat16")
    assert (model.dtype, model.device.type, model.source) == (torch.bfloat16, "cpu", str(folders["sdxl"]))
    for network in (model.unet, model.vae, model.text):
        assert not network.training
        for parameter in network.parameters():
            assert parameter.dtype == torch.bfloat16
            assert not parameter.requires_grad
            assert parameter.device.type == "cpu"
    assert model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(buffer.device.type == "cpu" for buffer in model.text.buffers())


@pytest.mark.parametrize(
    ("dtype", "vae_dtype", "wanted"),
    [
        ("float16", "auto", torch.float32),
        ("float16", "float16", torch.float16),
        ("bfloat16", "auto", torch.bfloat16),
        ("auto", "auto", torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_decoder_that_overflows_is_kept_in_float32(
    dtype: str, vae_dtype: Any, wanted: torch.dtype, folders: dict[str, Path]
) -> None:
    model = load_model(str(folders["sdxl"]), dtype=dtype, vae_dtype=vae_dtype)
    assert model.config.vae.force_upcast
    assert model.vae.dtype == wanted


@pytest.mark.slow
def test_no_thread_stays_behind() -> None:
    """A team of OpenMP threads that the caller had no use for would slow down an engine's own."""
    program = """
import os, time
from diffray.model import load_model

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
model = load_model(device="cpu")
until = time.monotonic() + 30
while threads() > before and time.monotonic() < until:
    time.sleep(0.1)
assert threads() <= before, (before, threads())
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_unknown_dtype(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="allowed is one of auto, float32"):
        load_model(str(folders["sd1"]), dtype="int4")


def test_weights_do_not_stay_mapped(single: Path) -> None:
    """A file replaced under a running model must not change or crash it."""
    model = load_model(str(single))
    before = model.unet.conv_in.weight.clone()
    with single.open("r+b") as file:
        file.truncate(0)
    assert torch.equal(model.unet.conv_in.weight, before)
    with pytest.raises(CheckpointError, match="changed on disk"):
        _ = model.checksum


def test_checksum(folders: dict[str, Path], sd1: Path) -> None:
    import hashlib

    single = folders["sd1.safetensors"]
    assert load_model(str(single)).checksum == hashlib.sha256(single.read_bytes()).hexdigest()
    first = load_model(str(sd1)).checksum
    assert first == load_model(str(folders["sd1"])).checksum
    scheduler = sd1 / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert load_model(str(sd1)).checksum != first


def test_an_autoencoder_from_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "sd1", seed=7)
    wanted = load_model(str(other)).vae.state_dict()
    file = convert(str(other), tmp_path / "other.safetensors")
    for source in (other, other / "vae", file):
        for target in ("sd1", "sd1.safetensors"):
            model = load_model(str(folders[target]), vae=str(source))
            assert all(torch.equal(wanted[k], v) for k, v in model.vae.state_dict().items())
    with pytest.raises(CheckpointError, match="no autoencoder in it"):
        load_model(str(folders["sd1"]), vae=str(other / "unet" / WEIGHTS))


# Accounting ------------------------------------------------------------------------------------------------


def test_one_error_lists_everything(single: Path) -> None:
    prefix = "model.diffusion_model."

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{prefix}out.2.bias"]
        tensors["who.knows"] = torch.zeros(2)
        tensors[f"{prefix}time_embed.0.bias"] = torch.zeros(3)
        tensors[f"{prefix}time_embed.2.bias"] = torch.zeros(128, dtype=torch.int32)

    edit(single, spoil, _metadata(single))
    with pytest.raises(CheckpointError) as caught:
        load_model(str(single))
    message = str(caught.value)
    assert str(single) in message
    assert f"1 missing: {prefix}out.2.bias" in message
    assert "1 unexpected: who.knows" in message
    assert f"{prefix}time_embed.0.bias (got [3], wanted [128])" in message
    assert f"{prefix}time_embed.2.bias (got type I32, wanted floats)" in message


def _metadata(file: Path) -> dict[str, str]:
    from diffray.model.weights.checkpoint import open_checkpoint

    return open_checkpoint(file).metadata


def test_long_lists_are_cut_with_a_count(sd1: Path) -> None:
    edit(sd1 / "unet" / WEIGHTS, lambda t: t.update({f"extra.{n}": torch.zeros(1) for n in range(25)}))
    with pytest.raises(CheckpointError, match=r"25 unexpected: unet: extra\.") as caught:
        load_model(str(sd1))
    assert str(caught.value).count("extra.") == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_values_that_are_not_finite(part: str, value: float, sd1: Path) -> None:
    file = next((sd1 / part).glob("*.safetensors"))
    key = sorted(load_file(file))[3]
    edit(file, lambda t: t[key].view(-1).__setitem__(-1, value))
    with pytest.raises(CheckpointError, match=f"1 not finite: {part}: .*{key.split('.')[-2]}"):
        load_model(str(sd1))


def test_values_that_float16_cannot_hold(sd1: Path) -> None:
    edit(sd1 / "unet" / WEIGHTS, lambda t: t["conv_in.bias"].fill_(1e5))
    load_model(str(sd1), dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"conv_in\.bias \(from 100000 to 100000\)"):
        load_model(str(sd1), dtype="float16")


def test_ignored_keys_are_ignored(single: Path) -> None:
    extra = {
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "denoiser.sigmas": torch.zeros(1000),
        "depth_model.model.x": torch.zeros(1),
        "global_step": torch.zeros((), dtype=torch.int64),
    }
    edit(single, lambda t: t.update(extra), _metadata(single))
    load_model(str(single))


def test_moving_average(single: Path) -> None:
    plain = load_model(str(single)).unet.state_dict()

    def average(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.startswith("model.diffusion_model.")]:
            tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key] + 1

    edit(single, average, _metadata(single))
    assert all(torch.equal(plain[k], v) for k, v in load_model(str(single)).unet.state_dict().items())
    for key, value in load_model(str(single), ema=True).unet.state_dict().items():
        torch.testing.assert_close(value, plain[key] + 1)


def test_no_moving_average(folders: dict[str, Path]) -> None:
    for name in ("sd1", "sd1.safetensors"):
        with pytest.raises(CheckpointError, match="option ema"):
            load_model(str(folders[name]), ema=True)


# Broken files ----------------------------------------------------------------------------------------------


def test_truncated_at_every_sixteenth(single: Path) -> None:
    whole = single.read_bytes()
    for n in range(16):
        single.write_bytes(whole[: len(whole) * n // 16])
        with pytest.raises(CheckpointError, match="incomplete file") as caught:
            load_model(str(single))
        assert str(single) in str(caught.value)
        assert str(len(whole) * n // 16) in str(caught.value) or n > 0


def header(**tensors: Any) -> bytes:
    raw = json.dumps(tensors).encode()
    return len(raw).to_bytes(8, "little") + raw


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        (0).to_bytes(8, "little") + b"x" * 100,
        (2**63).to_bytes(8, "little") + b"x" * 100,
        (200_000_000).to_bytes(8, "little") + b"x" * 100,
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        (4).to_bytes(8, "little") + b"[1, ",
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"a": {}, "a": {} } ',
        header(a=GOOD) + bytes(8 + 5),
        header(a=GOOD | {"data_offsets": [-8, 8]}) + bytes(8),
        header(a=GOOD | {"data_offsets": [8, 0]}) + bytes(8),
        header(a=GOOD | {"data_offsets": [0, 800]}) + bytes(8),
        header(a=GOOD | {"shape": [-2]}) + bytes(8),
        header(a=GOOD | {"shape": "many"}) + bytes(8),
        header(a=GOOD | {"data_offsets": None}) + bytes(8),
        header(a=[]) + bytes(8),
        b"",
        b"not a checkpoint at all",
    ],
)
def test_corrupt_headers(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(file)):
        load_model(str(file))


@pytest.mark.parametrize("change", [{"shape": [3]}, {"dtype": "F16"}, {"dtype": "F33"}])
def test_shapes_that_do_not_fit_their_bytes(change: dict[str, Any], single: Path) -> None:
    """Left to safetensors; asserted so that it stays so."""
    raw = single.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    head["model.diffusion_model.out.2.bias"] |= change
    new = json.dumps(head).encode()
    single.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    with pytest.raises(CheckpointError):
        load_model(str(single))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model(str(tmp_path / "none.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a diffusers folder"):
        load_model(str(tmp_path / "empty"))


class Payload:
    """Unpickling it would create the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch", "garbage"])
def test_pickles_are_never_opened(name: str, how: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / name
    if how == "torch":
        torch.save({"state_dict": Payload(canary)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(canary)) + (b"x" * 99 if how == "garbage" else b""))
    with pytest.raises(UnsafeCheckpoint, match="diffray convert"):
        load_model(str(file))
    assert not canary.exists()


def test_a_folder_of_pickles_names_the_way_out(sd1: Path) -> None:
    (sd1 / "unet" / WEIGHTS).rename(sd1 / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="diffray convert"):
        load_model(str(sd1))


def test_no_code_here_unpickles_more_than_tensors() -> None:
    """`torch.load` is called with the literal weights_only=True, or not at all; pickle is never loaded."""
    for file in (Path(blueprint.__file__).parent).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in {("pickle", "load"), ("pickle", "loads")}, file
            if (owner, node.func.attr) == ("torch", "load"):
                safe = {k.arg: k.value for k in node.keywords}.get("weights_only")
                assert isinstance(safe, ast.Constant), file
                assert safe.value is True, file


# Folders ---------------------------------------------------------------------------------------------------


def shard(folder: Path, count: int = 3) -> list[str]:
    """Splits a part's weights into shards, as diffusers does for big ones."""
    tensors = load_file(folder / WEIGHTS)
    names = [f"diffusion_pytorch_model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    placed = {key: names[i % count] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: tensors[k] for k, home in placed.items() if home == name}, folder / name)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": placed}))
    return names


def test_shards(sd1: Path) -> None:
    wanted = load_model(str(sd1)).unet.state_dict()
    names = shard(sd1 / "unet")
    assert all(torch.equal(wanted[k], v) for k, v in load_model(str(sd1)).unet.state_dict().items())
    (sd1 / "unet" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 3 shards are missing: {names[1]}"):
        load_model(str(sd1))


def test_a_tensor_in_two_shards(sd1: Path) -> None:
    names = shard(sd1 / "unet")
    first = load_file(sd1 / "unet" / names[0])
    key = next(iter(first))
    edit(sd1 / "unet" / names[1], lambda t: t.update({key: first[key]}))
    with pytest.raises(CheckpointError, match=f"{key} is also in"):
        load_model(str(sd1))


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "..", "", 7, "sub/x.safetensors"]
)
def test_an_index_cannot_leave_its_folder(name: Any, sd1: Path) -> None:
    shard(sd1 / "unet")
    index = sd1 / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        load_model(str(sd1))


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', "{}"])
def test_a_bad_index(content: str, sd1: Path) -> None:
    shard(sd1 / "unet")
    (sd1 / "unet" / f"{WEIGHTS}.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a shard index"):
        load_model(str(sd1))


def test_half_precision_variant(sd1: Path) -> None:
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (sd1 / part / f"{stem}.safetensors").rename(sd1 / part / f"{stem}.fp16.safetensors")
    load_model(str(sd1))


@pytest.mark.parametrize("content", ["{", "[]", "3"])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_bad_json(name: str, content: str, sd1: Path) -> None:
    (sd1 / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}"):
        load_model(str(sd1))


@pytest.mark.parametrize("missing", ["unet", "vae", "text_encoder"])
def test_a_folder_without_a_part(missing: str, sd1: Path) -> None:
    import shutil

    shutil.rmtree(sd1 / missing)
    with pytest.raises(CheckpointError, match=missing):
        load_model(str(sd1))


def test_a_tokenizer_of_another_size(sd1: Path) -> None:
    import shutil

    shutil.rmtree(sd1 / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer has 49408 ids, the embedding 57 rows"):
        load_model(str(sd1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"_class_name": "EDMEulerScheduler"}, "EDM"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"_class_name": "Surprise"}, "Surprise"),
    ],
)
def test_noise_that_is_not_implemented(change: dict[str, Any], message: str, sd1: Path) -> None:
    file = sd1 / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_model(str(sd1))


def test_a_config_cannot_name_code(sd1: Path) -> None:
    file = sd1 / "unet" / "config.json"
    config = unet_config("sd1") | {
        "_class_name": "os.system",
        "auto_map": {"AutoModel": "x.y"},
        "trust_remote_code": True,
    }
    file.write_text(json.dumps(config))
    assert load_model(str(sd1)).config.family == "sd1"  # read as data, never imported
