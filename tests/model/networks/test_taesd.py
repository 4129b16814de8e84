"""TAESD against diffusers' AutoencoderTiny, from every naming on disk."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from diffray.model.errors import CheckpointError
from diffray.model.networks.taesd import TinyDecoder, TinyEncoder, load_decoder, load_encoder
from diffray.model.weights.load import load_model

from ..checkpoints import layout, write_folder


@pytest.fixture
def reference(tmp_path: Path) -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny().eval()
    model.save_pretrained(tmp_path / "taesd")
    return model


@torch.no_grad()
@pytest.mark.parametrize("naming", ["folder", "alone", "both", "prefixed"])
def test_parity(naming: str, reference: diffusers.AutoencoderTiny, tmp_path: Path) -> None:
    source = tmp_path / "taesd"
    paths = {"encoder": source, "decoder": source}
    if naming != "folder":
        halves = {"encoder": load_encoder(source).state_dict(), "decoder": load_decoder(source).state_dict()}
        prefix = {"alone": "", "both": "{}.", "prefixed": "taesd_{}."}[naming]
        named = {h: {prefix.format(h) + k: v for k, v in state.items()} for h, state in halves.items()}
        for half in paths:
            paths[half] = tmp_path / f"{half}.safetensors"
            save_file(named[half] if naming == "alone" else named["encoder"] | named["decoder"], paths[half])
    images = torch.rand(1, 3, 32, 40)
    latents = load_encoder(paths["encoder"])(images)
    torch.testing.assert_close(latents, reference.encode(images * 2 - 1).latents, rtol=1e-5, atol=1e-6)
    decoded = load_decoder(paths["decoder"])(latents)
    torch.testing.assert_close(decoded * 2 - 1, reference.decode(latents).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "channels"), [("taesd_taesdxl", 4), ("taesd3", 16)])
def test_published_layouts(name: str, channels: int) -> None:
    for half, kind in (("encoder", TinyEncoder), ("decoder", TinyDecoder)):
        wanted = {key: shape for key, (shape, _) in layout(f"{name}_{half}.single").items()}
        assert {k: tuple(v.shape) for k, v in kind(channels).state_dict().items()} == wanted


def test_wrong_files(reference: diffusers.AutoencoderTiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing or misshapen"):
        load_decoder(tmp_path / "taesd", latent_channels=16)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no TAESD decoder"):
        load_decoder(tmp_path / "x.safetensors")


def test_as_preview_of_a_model(reference: diffusers.AutoencoderTiny, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sd1", "sd1")
    model = load_model(str(folder), taesd=str(tmp_path / "taesd"))
    assert model.preview is not None
    assert not model.preview.training
    assert load_model(str(folder)).preview is None
