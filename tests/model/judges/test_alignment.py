"""Safety checker and CLIP score against diffusers and transformers, on small random weights in the true layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffray.model import CheckpointError
from diffray.model.judges.alignment import ClipScore
from diffray.model.judges.safety import SafetyChecker
from diffray.model.judges.vision import clip_pixels, weights_checksum
from tests.model.clip_models import SIDE, VISION, safety_checker, save_clip, save_safety_checker, tokenizer
from tests.model.oracle import source_image

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in [(64, 64), (40, 90), (90, 41)]]
    return [*map(Image.fromarray, noise), source_image(64, 48), Image.new("RGB", (20, 20), "red")]


def test_pixels_equal_the_processor_of_transformers() -> None:
    for picture in [*pictures(), pictures()[0].convert("RGBA"), pictures()[0].convert("L")]:
        wanted = PROCESSOR(picture, return_tensors="pt")["pixel_values"]
        assert torch.allclose(clip_pixels(picture, SIDE), wanted, atol=1e-5)


# Safety checker --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> StableDiffusionSafetyChecker:
    return safety_checker()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_safety_checker(tmp_path)
    return tmp_path


def thresholds(folder: Path, concept: float, special: float) -> None:
    """Shift the thresholds of a saved checker."""
    weights = load_file(folder / "model.safetensors")
    weights["concept_embeds_weights"] = torch.full((17,), concept)
    weights["special_care_embeds_weights"] = torch.full((3,), special)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_verdicts_equal_diffusers(oracle: StableDiffusionSafetyChecker, folder: Path) -> None:
    checker, seen = SafetyChecker(folder, device="cpu"), set()
    original = oracle.concept_embeds_weights.clone()
    for shift in (-0.3, 0.0, 0.3, 0.6):
        with torch.no_grad():
            oracle.concept_embeds_weights.copy_(original + shift)
            checker.get_buffer("concept_embeds_weights").copy_(original + shift)
        for picture in pictures():
            pixels = PROCESSOR(picture, return_tensors="pt")["pixel_values"]
            _, [wanted] = oracle(clip_input=pixels, images=torch.ones(1, 3, 4, 4))
            before = picture.tobytes()
            verdict = checker(picture)
            assert verdict.nsfw == wanted
            assert (verdict.nsfw_score > 0) == wanted
            assert picture.tobytes() == before
            seen.add(wanted)
    with torch.no_grad():
        oracle.concept_embeds_weights.copy_(original)
    assert seen == {True, False}


def test_special_care_lowers_the_bar(folder: Path) -> None:
    picture = pictures()[0]
    thresholds(folder, concept=0.0, special=2.0)
    alone = SafetyChecker(folder, device="cpu")(picture).nsfw_score
    thresholds(folder, concept=0.0, special=-2.0)
    assert SafetyChecker(folder, device="cpu")(picture).nsfw_score == pytest.approx(alone + 0.01, abs=1.1e-3)


def test_the_checker_is_found_in_a_pipeline_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = tmp_path_factory.mktemp("pipeline")
    (pipeline / "safety_checker").symlink_to(folder)
    wanted = SafetyChecker(folder, device="cpu")(pictures()[0])
    assert SafetyChecker(pipeline, device="cpu")(pictures()[0]) == wanted
    assert weights_checksum(str(pipeline)) == weights_checksum(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("visual_projection.weight"), "missing tower.visual_projection.weight"),
        (lambda w: w.pop("concept_embeds"), "no safety checker"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda w: w.update({"visual_projection.weight": torch.ones(16, 31)}), "expected"),
        (lambda w: w.update({"visual_projection.weight": torch.full((16, 32), float("nan"))}), "not finite"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, damage: Any, message: str) -> None:
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        SafetyChecker(folder, device="cpu")


def test_what_is_no_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match="looked in"):
        SafetyChecker("/no/such/folder")
    with pytest.raises(CheckpointError, match="got a file"):
        SafetyChecker(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        SafetyChecker(tmp_path_factory.mktemp("empty"))


def test_the_checksum_follows_the_weights(folder: Path) -> None:
    before = weights_checksum(str(folder))
    assert before == weights_checksum(str(folder))
    thresholds(folder, concept=0.123, special=1.0)
    assert weights_checksum(str(folder)) != before


# CLIP score ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


def test_scores_equal_transformers(clip_folder: Path) -> None:
    words = tokenizer()
    mine, wanted = ClipScore(clip_folder, device="cpu"), CLIPModel.from_pretrained(clip_folder).eval()
    for prompt in ("a red circle", "a large blue star on a green background", ""):
        ids = torch.tensor([[words.bos_id, *words.encode(prompt), words.eos_id]])
        for picture in pictures():
            pixels = PROCESSOR(picture, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                found = wanted(input_ids=ids, pixel_values=pixels)
            cosine = (found.logits_per_image / wanted.logit_scale.exp()).item()
            assert mine(picture, prompt) == pytest.approx(100 * max(cosine, 0), abs=1e-3)


def test_weights_in_the_prompt_do_not_count_and_long_ones_are_cut(clip_folder: Path) -> None:
    score, picture = ClipScore(clip_folder, device="cpu"), pictures()[3]
    assert score(picture, "a (red:1.4) [circle]") == score(picture, "a red circle")
    assert score(picture, "red " * 14) == score(picture, "red " * 400)


def test_a_clip_folder_must_be_whole(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(clip_folder / name)
    config = json.loads((clip_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vision_config": {**VISION, "hidden_size": 64}})
    )
    with pytest.raises(CheckpointError, match="expected"):
        ClipScore(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no CLIP model"):
        ClipScore(tmp_path, device="cpu")
