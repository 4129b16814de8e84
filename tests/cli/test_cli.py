"""The command: what it prints, and the exit codes that scripts rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.model.errors import GenerationError
from diffray.pipelines import Store, job_status
from diffray.pipelines.runs import read_runs
from tests.pipelines.fake import FakeModels

from .conftest import diffray

DIFFRAY = Path(sys.executable).with_name("diffray")


def test_help_and_version_do_not_wait_for_torch_or_ray() -> None:
    code = "import sys; import diffray.cli; print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    shown = subprocess.run([DIFFRAY, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("diffray ")


def commands(group: Any, name: str = "diffray") -> Iterator[tuple[str, Any]]:
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def test_every_option_is_explained_and_every_list_of_commands_holds_whole_sentences() -> None:
    for name, command in commands(typer.main.get_command(app)):
        assert not command.get_short_help_str(59).endswith("..."), name
        for option in command.params:
            assert option.name == "help" or option.help, f"{name} --{option.name}"


@pytest.mark.usefixtures("fake")
def test_generate_again_and_status(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, error = diffray("generate", table, out, "--steps", 3, "-n", 2, "--set", "eta=0.5")
    assert (code, error.splitlines()[-1]) == (0, "4/4 images, 2 rejected, " + error.split()[-1])
    assert "2 images, 2 rejected (see rejected/)" in text
    code, text, _ = diffray("generate", table, out, "--steps", 3, "-n", 2, "--set", "eta=0.5")
    assert (code, text.startswith("nothing to do")) == (0, True)
    code, text, _ = diffray("status", out)
    assert (code, text.splitlines()) == (
        0,
        ["4 of 4 images ended, 2 of them rejected", "1 of 1 shards committed; complete"],
    )


@pytest.mark.usefixtures("fake")
def test_run_is_generate_from_a_file(table: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"input: {table}\noutput: {tmp_path}/a\ndefaults: {{steps: 3}}\n")
    assert diffray("run", job)[0] == 0
    assert diffray("generate", table, tmp_path / "b", "--steps", 3)[0] == 0
    one, two = (job_status(Store(str(tmp_path / name))) for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: a\n", "output: Field required"),
        ("input: a\noutput: b\nstep: 3\n", "step: Extra inputs are not permitted"),
        ("input: a\noutput: b\nshards: {images: 0}\n", "shards.images"),
        (
            "input: a\noutput: b\ndefaults: {steps: 3}\ndefaults: {seed: 1}\n",
            "no YAML in line 4: defaults twice",
        ),
        ("- a\n", "expected a mapping"),
        ("input: [\n", "job.yaml"),
    ],
)
def test_a_job_file_that_is_not_valid_exits_2(tmp_path: Path, text: str, message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    code, _, error = diffray("run", job)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("fake")
def test_wrong_use_exits_2(table: Path, tmp_path: Path) -> None:
    assert diffray("generate", table)[0] == 2
    assert diffray("generate", tmp_path / "none.csv", tmp_path / "o")[0] == 2
    for wrong in (
        ["--steps", 0],
        ["--set", "step=3"],
        ["--set", "width=wide"],
        ["--format", "gif"],
        ["--set", "x"],
    ):
        code, _, error = diffray("generate", table, tmp_path / "o", *wrong)
        assert code == 2, wrong
        assert str(wrong[1]).partition("=")[0] in error


@pytest.mark.usefixtures("fake")
def test_a_conflict_exits_3_and_shows_the_difference(table: Path, tmp_path: Path) -> None:
    diffray("generate", table, tmp_path / "o")
    code, _, error = diffray("generate", table, tmp_path / "o", "--seed", 9)
    assert code == 3
    assert "  config.seed: 0 -> 9" in error.splitlines()


@pytest.mark.usefixtures("fake")
def test_too_many_rejected_rows_exit_4_and_the_rest_is_there(table: Path, tmp_path: Path) -> None:
    command = ["generate", table, tmp_path / "o", "--max-rejected"]
    code, _, error = diffray(*command, 0.4)
    assert code == 4
    assert error.splitlines()[-1] == (
        "diffray: 1 of 2 images are rejected (0.5), max_rejected allows 0.4; all is committed, the reasons are in "
        f"{tmp_path}/o/rejected"
    )
    assert job_status(Store(str(tmp_path / "o"))).phase == "complete"
    assert diffray(*command, 0.5)[0] == 0
    assert diffray("generate", table, tmp_path / "p", "--set", "width=wide", "--dry-run")[0] == 2
    (tmp_path / "w.csv").write_text("prompt,width\nx,wide\n")
    code, text, error = diffray("generate", tmp_path / "w.csv", tmp_path / "p", "--dry-run")
    assert (code, "width: got 'wide'" in text, "not all may be; a run would stop" in error) == (4, True, True)


@pytest.mark.usefixtures("fake")
def test_a_failure_exits_1_and_debug_shows_where(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise GenerationError("no such luck")

    monkeypatch.setattr(FakeModels, "open", fails)
    code, _, error = diffray("generate", table, tmp_path / "o")
    assert (code, error.splitlines()[-1]) == (1, "diffray: no such luck")
    result = CliRunner().invoke(app, ["--debug", "generate", str(table), str(tmp_path / "o")])
    assert isinstance(result.exception, GenerationError)


@pytest.mark.usefixtures("fake")
def test_ctrl_c_exits_130_and_releases_the_output(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeModels, "open", stopped)
        code, _, error = diffray("generate", table, tmp_path / "o")
    assert (code, "run the same command to go on" in error) == (130, True)
    assert job_status(Store(str(tmp_path / "o"))).owner is None
    assert diffray("generate", table, tmp_path / "o")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["terminate", "interrupt"])
def test_sigterm_exits_143_and_ctrl_c_130_and_the_job_can_go_on(tmp_path: Path, stop: str) -> None:
    table = tmp_path / "p.csv"
    table.write_text("prompt,n\nSLOW,200\n")
    launcher = tmp_path / "launch.py"
    pipelines = Path(__file__).parent.parent / "pipelines"
    launcher.write_text(
        f"import sys; sys.path.insert(0, {str(pipelines)!r})\n"
        "import fake, ray.cloudpickle; ray.cloudpickle.register_pickle_by_value(fake)\n"
        "import diffray.pipelines.job as job; job.Models = fake.FakeModels\n"
        "from diffray.cli import main; main()\n"
    )
    command = [sys.executable, launcher, "generate", table, tmp_path / "o", "--shard-images", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        start_new_session=True,
        # Under nohup and the like the tests ignore it, and what they start would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 280
        while not list((tmp_path / "o/_diffray/commits").glob("*.json")):
            assert time.monotonic() < until, "no shard was committed"
            time.sleep(0.1)
    finally:
        if stop == "terminate":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to Ray's processes as well
        _, error = process.communicate()
    code, word = (143, "terminated") if stop == "terminate" else (130, "interrupted")
    assert (process.returncode, error.splitlines()[-1]) == (
        code,
        f"diffray: {word}; run the same command to go on",
    )
    assert job_status(Store(str(tmp_path / "o"))).owner is None
    assert job_status(Store(str(tmp_path / "o"))).phase == "stopped"
    [run], committed = (
        read_runs(Store(str(tmp_path / "o"))),
        list((tmp_path / "o/_diffray/commits").iterdir()),
    )
    assert (run["outcome"], run["shards"], run["images"]) == ("stopped", len(committed), len(committed))
    assert sum(engine["images"] for engine in run["engines"]) >= len(committed)
