"""Whole jobs on S3: input, model and output there, faults on the way, credentials that expire and never show."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.model.errors import JobConflict, JobError, StorageError
from diffray.model.weights.source import embedded, resolve
from diffray.pipelines import InvalidJob, JobConfig, Store, job_status, verify
from diffray.pipelines.outputs import lock

from .conftest import Place, in_process
from .s3 import S3, Fault, broken

TABLE = "prompt,n,label\np,3,a\nPOISON,1,b\nq,3,c\n"
DIFFRAY = Path(sys.executable).with_name("diffray")


def on_s3(s3: S3, url: str, table: str = TABLE, **values: Any) -> JobConfig:
    """A job whose input and output are both in a folder of a bucket."""
    s3.filesystem().pipe(f"{url.removeprefix('s3://')}/in/prompts.csv", table.encode())
    storage = {"s3": s3.options(config_kwargs={"read_timeout": 1})}
    common = {"input": f"{url}/in/*.csv", "output": f"{url}/out", "storage": storage}
    return JobConfig.checked({**common, "shards": {"images": 2}, "contact_sheet": 0, "gallery": 0, **values})


def contents(s3: S3, url: str) -> dict[str, str]:
    """Path to checksum of everything in the dataset of a finished job."""
    files, root = s3.filesystem(), f"{url.removeprefix('s3://')}/out"
    found = [name for folder in ("data", "rejected") for name in files.find(f"{root}/{folder}")]
    return {name.removeprefix(root): files.info(name)["ETag"] for name in found}


def everything(s3: S3, url: str) -> dict[str, bytes]:
    files, root = s3.filesystem(), url.removeprefix("s3://")
    return {name: files.cat_file(name) for name in files.find(root)}


@pytest.mark.slow
def test_a_job_with_input_and_output_on_s3_is_the_one_on_disk(place: Place, s3: S3) -> None:
    url = s3.folder()
    pages = {"contact_sheet": 2, "gallery": 2}
    place.job(place.write(TABLE), shards={"images": 2}, **pages)
    result = place.run(on_s3(s3, url, **pages))
    assert (result.images, result.rejected, result.shards) == (6, 1, 4)
    local = {name: data for name, data in place.bytes().items() if name.startswith(("data/", "rejected/"))}
    remote = {
        name.partition("/out/")[2]: hashlib.sha256(data).hexdigest()
        for name, data in everything(s3, f"{url}/out").items()
        if "/_diffray/" not in name
    }
    assert {n: d for n, d in remote.items() if n.startswith(("data/", "rejected/"))} == local
    assert place.run(on_s3(s3, url, **pages)).made == 0
    assert job_status(Store(f"{url}/out", s3.options())).phase == "complete"
    assert verify(Store(f"{url}/out", s3.options())).faults == ()


def test_the_options_of_the_longest_prefix_count() -> None:
    config = JobConfig(
        input="a", output="b", storage={"s3": {"a": 1}, "s3://public/": {"anon": True}, "gs": {"b": 2}}
    )
    assert config.storage_options("s3://private/x") == {"a": 1}
    assert config.storage_options("s3://public/x") == {"anon": True}
    assert config.storage_options("s3://public") == {"anon": True}
    assert config.storage_options("s3://publicity/x") == {"a": 1}
    assert config.storage_options("/local") == {}


# Secrets ---------------------------------------------------------------------------------------------------


def test_secrets_are_in_nothing_that_is_written_or_said(
    place: Place, s3: S3, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url = s3.folder()
    config = on_s3(s3, url)
    with caplog.at_level(logging.DEBUG, logger="diffray"):
        place.run(config)
    written = everything(s3, f"{url}/out")
    assert len(written) > 10
    assert [name for name, data in written.items() if s3.secret.encode() in data] == []
    said = [caplog.text, *capfd.readouterr(), repr(config), str(config), config.model_dump_json()]
    with pytest.raises(JobConflict) as conflict:
        place.run(on_s3(s3, url, seed=5))
    said.append(str(conflict.value))
    assert [text for text in said if s3.secret in text] == []


@pytest.mark.parametrize(
    "job",
    [
        "input: a\nstorage: {s3: {secret: sesame}}\n",
        "input: a\noutput: b\nstorge: {s3: {secret: sesame}}\n",
        "input: a\noutput: b\nstorage: sesame\n",
        "input: a\noutput: b\nstorage: {s3: sesame}\n",
        "input: a\noutput: b\nstorage: {s3: {secret: sesame\n",
        "input: [a\noutput: b\nsecret: sesame: x\n",
    ],
)
def test_a_job_file_that_is_wrong_is_refused_without_its_secrets(place: Place, job: str) -> None:
    with pytest.raises(InvalidJob) as refusal:
        JobConfig.from_yaml(place.write(job, "job.yaml"))
    assert "sesame" not in str(refusal.value)
    assert "sesame" not in repr(refusal.value.__cause__)


# Faults ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_survives_a_storage_that_breaks_all_the_time(place: Place, s3: S3) -> None:
    clean, url, dice = s3.folder(), s3.folder(), random.Random(7)
    place.run(on_s3(s3, clean))

    def fault(number: int, method: str, path: str) -> Fault:
        kinds: list[Fault] = ["503", "reset", "lost", 1.5]
        if method == "GET" and "list-type" not in path:
            kinds.append("truncated")
        return dice.choice(kinds) if dice.random() < 0.1 else None

    with broken(s3) as (proxy, through):
        config = on_s3(through, url)
        proxy.fault = fault
        result = place.run(config)
        assert proxy.faults() >= 10
    assert (result.images, result.rejected) == (6, 1)
    assert contents(s3, url) == contents(s3, clean)
    assert verify(Store(f"{url}/out", s3.options())).faults == ()


@pytest.mark.slow
def test_credentials_that_expire_stop_the_job_and_it_goes_on_with_new_ones(place: Place, s3: S3) -> None:
    clean, url = s3.folder(), s3.folder()
    place.run(on_s3(s3, clean))
    with broken(s3) as (proxy, through):
        config = on_s3(through, url)
        puts = 0

        def fault(number: int, method: str, path: str) -> Fault:
            nonlocal puts
            puts += method == "PUT"
            return "expired" if puts > 12 else None

        proxy.fault = fault
        with pytest.raises(StorageError, match=r"s3|out/.*: ExpiredToken") as stopped:
            place.run(config)
        assert s3.secret not in str(stopped.value)
        began = [path for method, path, fault in proxy.requests if fault]
        assert len(began) < 20, "an expired token is not to be tried again and again"
    assert job_status(Store(f"{url}/out", s3.options())).committed < 4
    place.run(on_s3(s3, url), take_over=True)  # the lock could not be released without credentials
    assert contents(s3, url) == contents(s3, clean)


@pytest.mark.slow
def test_of_two_drivers_at_once_one_works(place: Place, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.2)
    url, ended = s3.folder(), []
    config = on_s3(s3, url, table="prompt,n\nSLOW,9\n")

    def drive() -> None:
        try:
            ended.append(place.run(config, generate=in_process).images)
        except JobConflict as conflict:
            ended.append(str(conflict))

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    worked = [one for one in ended if one == 9]
    refused = [one for one in ended if isinstance(one, str)]
    # The second one may also come when the first has finished: then it has nothing to do.
    assert len(worked) + len(refused) == 2
    assert worked
    assert all("being worked on by process" in one or "just now taken" in one for one in refused)
    assert verify(Store(f"{url}/out", s3.options())).faults == ()


@pytest.mark.parametrize("fault", ["503", "reset", "truncated"])
def test_a_model_is_fetched_whole_in_spite_of_faults(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("DIFFRAY_CACHE", str(tmp_path))
    data = random.Random(1).randbytes(300_000)
    url = f"{s3.folder()}/model.safetensors"
    s3.filesystem().pipe(url.removeprefix("s3://"), data)
    with broken(s3) as (proxy, through):
        gets = 0

        def once(number: int, method: str, path: str) -> Fault:
            nonlocal gets
            gets += method == "GET" and "list-type" not in path
            return fault if gets == 1 and method == "GET" else None

        proxy.fault = once
        fetched = resolve(f"{url}#sha256={hashlib.sha256(data).hexdigest()}", through.options())
        assert proxy.faults() == 1
    assert fetched.read_bytes() == data
    assert [path.name for path in tmp_path.rglob("*.part")] == []


# The command -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_with_input_model_and_output_on_s3(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process with Ray: the worker gets the options too, and no log holds the secret."""
    url, files = s3.folder(), s3.filesystem()
    root = url.removeprefix("s3://")
    files.put(str(embedded()), f"{root}/model/", recursive=True)
    files.pipe(f"{root}/prompts.csv", b"prompt\na red circle\na blue square\n")
    [folder] = [name for name in files.ls(f"{root}/model", detail=False) if files.isdir(name)] or [
        f"{root}/model"
    ]
    model = f"s3://{root}/model" if files.exists(f"{root}/model/model_index.json") else f"s3://{folder}"
    job = {
        "input": f"{url}/prompts.csv",
        "output": f"{url}/out",
        "model": {"source": model},
        "defaults": {"steps": 2},
        "storage": {"s3": s3.options()},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    logs = tempfile.mkdtemp(prefix="dr", dir="/tmp")  # Ray's socket paths have to be short
    hidden = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment = {**hidden, "RAY_TMPDIR": logs, "DIFFRAY_CACHE": str(tmp_path / "cache")}
    try:
        done = subprocess.run(
            [DIFFRAY, "run", tmp_path / "job.yaml"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"2 images in {url}/out" in done.stdout
        found = subprocess.run(["grep", "-rlF", s3.secret, logs], capture_output=True, text=True, check=False)
        assert (found.stdout, s3.secret in done.stdout + done.stderr) == ("", False)
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    assert [n for n, data in everything(s3, f"{url}/out").items() if s3.secret.encode() in data] == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    for command in (["status"], ["verify"], ["gc", "--age", "0"]):
        shown = CliRunner().invoke(app, [*command, f"{url}/out", "--endpoint", s3.endpoint])
        assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.endswith("0 orphans deleted\n")


def test_a_source_picture_on_s3_is_known_by_its_etag(place: Place, s3: S3) -> None:
    url, files = s3.folder(), s3.filesystem()
    config = on_s3(s3, url, "image,prompt\na.bmp,x\nb.bmp,y\nno.bmp,z\n", task="augment")
    pictures = {}
    for name, colour in {"a": "red", "b": "green", "other": "blue"}.items():
        Image.new("RGB", (16, 16), colour).save(data := io.BytesIO(), "BMP")
        pictures[name] = data.getvalue()
    names = {name: f"{url.removeprefix('s3://')}/in/{name}.bmp" for name in "ab"}
    files.pipe({path: pictures[name] for name, path in names.items()})
    assert place.run(config).images == 2
    files.pipe(names["a"], pictures["a"])  # the same bytes at a later time are the same file
    assert place.run(config).made == 0
    files.pipe(names["a"], pictures["other"])
    with pytest.raises(JobConflict, match=r"a\.bmp: 822 bytes, ETag \w+ -> 822 bytes, ETag \w+"):
        place.run(config)


def test_credentials_that_expired_are_no_missing_pictures(place: Place, s3: S3) -> None:
    url, files = s3.folder(), s3.filesystem()
    Image.new("RGB", (16, 16)).save(data := io.BytesIO(), "BMP")
    files.pipe(f"{url.removeprefix('s3://')}/a.bmp", data.getvalue())
    with broken(s3) as (proxy, through):
        table, storage = place.write("image,prompt\na.bmp,x\n"), {"s3": through.options()}
        config = place.config(table, task="augment", pictures={"root": url}, storage=storage)
        assert place.run(config).images == 1
        proxy.fault = lambda number, method, path: "expired"
        with pytest.raises(JobError, match=r"a\.bmp cannot be looked at"):
            place.run(config)
