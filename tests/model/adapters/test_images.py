"""Images with adapters: diffusers' with the same file, and the same bytes in whatever company."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffray.model import load_model

from .. import oracle
from . import files

BASE = {"negative_prompt": oracle.NEGATIVE, "guidance_scale": 4.0}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_an_image_is_that_of_diffusers(kind: str, layout: str, tmp_path: Path) -> None:
    file = files.write(tmp_path / "own.safetensors", kind, layout)
    model = load_model(str(oracle.folder(kind)), device="cpu", dtype="float32", adapters={"own": file})
    asked = BASE | {"width": oracle.SIDE, "height": oracle.SIDE}
    got = oracle.latents(model, steps=3, adapters="own:0.7", **asked)
    wanted = oracle.theirs(files.pipeline(kind, (file, 0.7)), num_inference_steps=3, **asked)
    plain = oracle.theirs(oracle.pipeline(kind), num_inference_steps=3, **asked)
    assert oracle.relative(got, wanted) < oracle.TOLERANCE
    assert oracle.relative(plain, wanted) > 0.05
    assert oracle.relative(oracle.latents(model, steps=3, **asked), plain) < oracle.TOLERANCE
