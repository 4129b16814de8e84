"""The wheel works where the repository is not: from an empty folder, beside a user's own `model.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a build leaves its folders beside what it builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "build", "tests", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "diffray/model/engine.py" in names
    assert "diffray/model/data/bpe_simple_vocab_16e6.txt.gz" in names
    assert "diffray/model/embedded/unet/diffusion_pytorch_model.safetensors" in names
    pages = {f"diffray/serve/static/{path.name}" for path in (ROOT / "serve" / "static").iterdir()}
    assert pages <= set(names)
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert not [name for name in names if name.split("/")[0] in {"model", "pipelines", "tests", "training"}]


@pytest.mark.slow
def test_wheel_runs_beside_modules_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("model.py", "serve.py", "pipelines.py", "cli.py"):
        (work / name).write_text("raise RuntimeError('a user file was imported')\n")
    code = (
        "import diffray.model, diffray.pipelines, diffray.cli; "
        f"assert diffray.model.__file__.startswith({str(site)!r}), diffray.model.__file__; "
        "from diffray.model import Engine, ImageRequest, load_model; "
        "r = Engine(load_model()).generate([ImageRequest(prompt='a red circle', steps=2)]); assert r[0].image.size"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
