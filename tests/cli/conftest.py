"""The command in this process, and its jobs on the fake engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.pipelines import job
from diffray.pipelines.upkeep import care
from tests.pipelines.conftest import in_process
from tests.pipelines.fake import FakeModels


def diffray(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and error output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the command run on the fake engine, in this process."""
    for module, command in ((job, job.run), (care, care.retry_rejected)):
        monkeypatch.setattr(module, "Models", FakeModels)
        monkeypatch.setitem(command.__kwdefaults__ or {}, "generate", in_process)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "p.csv"
    path.write_text("id,prompt\na,x\nb,POISON\n")
    return path
