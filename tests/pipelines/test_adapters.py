"""Adapters in a batch: from columns, defaults and sweeps to images, and no change of a file goes unnoticed."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffray.model import Engine, ImageRequest, load_model
from diffray.model.encoding import encode_image
from diffray.model.errors import CheckpointError, JobConflict
from diffray.pipelines import InvalidJob, JobConfig, retry_rejected
from diffray.pipelines.models import Models
from diffray.pipelines.options import ModelOptions

from .conftest import Place, in_process
from .fake import FakeEngine, FakeModels
from .s3 import S3, broken

QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
"""A module of the embedded model's UNet, 128 to 128."""


def lora(place: Place, name: str, seed: int = 0) -> str:
    """A file of rank 4 that changes a picture visibly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (4, 128), "lora_B": (128, 4)}
    factors = {
        f"{QUERY}.{factor}.weight": torch.randn(shape, generator=generator)
        for factor, shape in shapes.items()
    }
    save_file(factors, place.path / f"{name}.safetensors")
    return str(place.path / f"{name}.safetensors")


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def job(place: Place, input: str, output: str = "out", **values: Any) -> JobConfig:
    """On the fake engine, with two adapters."""
    adapters = {name: lora(place, name, seed) for seed, name in enumerate(("ink", "oil"))}
    options = {"options": {"log": str(place.log)}, "adapters": adapters}
    return place.config(input, output, model=options, **values)


def chosen(rows: list[dict[str, Any]]) -> list[list[tuple[str, float]]]:
    return [[(one["name"], one["weight"]) for one in row["adapters"]] for row in rows]


CELLS = "ink", '"oil:0.5, ink:-1"', "ink:0", ""
READ = [("ink", 1.0)], [("ink", -1.0), ("oil", 0.5)], [], []


def test_a_column_of_text(place: Place) -> None:
    table = place.write("prompt,adapters\n" + "".join(f"p,{cell}\n" for cell in CELLS))
    place.run(job(place, table))
    assert tuple(chosen(place.rows())) == READ
    assert pq.read_schema(place.path / "out/data/part-00000.parquet").field("adapters").type == pa.list_(
        pa.struct([("name", pa.string()), ("weight", pa.float64())])
    )


def test_a_column_of_lists_and_a_dataset_fed_back(place: Place) -> None:
    cells = [[{"name": name, "weight": weight} for name, weight in one] for one in READ]
    table = pa.table({"prompt": ["p"] * len(cells), "lora": pa.array([*cells[:-1], None])})
    path = place.path / "in.parquet"
    pq.write_table(table, path)
    place.run(job(place, str(path), columns={"adapters": "lora"}))
    assert tuple(chosen(place.rows())) == READ
    place.run(job(place, str(place.path / "out/data"), "again"))
    again = {row["id"]: (row["sha256"], row["adapters"]) for row in place.rows("again")}
    assert again == {row["id"]: (row["sha256"], row["adapters"]) for row in place.rows()}


def test_a_default_and_a_sweep(place: Place) -> None:
    table = place.write("prompt,adapters\np,\nq,oil\n")
    place.run(job(place, table, defaults={"adapters": "ink:0.8"}))
    assert chosen(place.rows()) == [[("ink", 0.8)], [("oil", 1.0)]]
    place.run(job(place, table, "swept", sweep={"adapters": ["", "ink:0.5", [{"name": "oil", "weight": 2}]]}))
    assert chosen(place.rows("swept")) == [[], [("ink", 0.5)], [("oil", 2.0)]] * 2
    assert len({row["id"] for row in place.rows("swept")}) == 6


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("pen", "got 'pen', allowed is one of ink, oil"),
        ("ink:11", "ink: got weight 11.0, allowed is -10..10"),
        ("ink:much", "ink: got weight 'much', allowed is a number"),
        ('"ink,ink"', "got 'ink' twice, allowed is each name once"),
        ("../ink", "got name '../ink', allowed are"),
    ],
)
def test_what_is_not_allowed_costs_its_row(place: Place, cell: str, reason: str) -> None:
    result = place.run(job(place, place.write(f"prompt,adapters\np,ink\nq,{cell}\n")))
    assert (result.images, result.rejected) == (1, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["stage"], row["field"]) == ("q", "plan", "adapters")
    assert row["reason"].startswith(reason)
    assert row["adapters"] == cell.strip('"')


def test_defaults_are_checked_before_anything_is_made(place: Place) -> None:
    table = place.write("prompt\np\n")
    with pytest.raises(InvalidJob, match=r"defaults: adapters: got 'pen', allowed is one of ink, oil"):
        place.run(job(place, table, defaults={"adapters": "pen"}))
    with pytest.raises(InvalidJob, match=r"defaults: adapters: .*this model has no adapters"):
        place.job(table, defaults={"adapters": "pen"})
    missing = {"adapters": {"ink": str(place.path / "nothing.safetensors")}}
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        place.job(table, model=missing)
    assert not (place.path / "out/data").exists()


def test_a_rejected_row_asks_for_the_same_adapters_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run(job(place, place.write('prompt,adapters\nPOISON,"oil:0.25, ink"\n')))
    [row] = place.rows(folder="rejected")
    assert row["adapters"] == "ink:1, oil:0.25"
    monkeypatch.setattr(FakeEngine, "poisonous", False)
    place.run(job(place, str(place.path / "out/rejected"), "fed"))
    retry_rejected(str(place.path / "out"), models=FakeModels(), generate=in_process)
    for name in ("fed", "out"):
        assert chosen(place.rows(name)) == [[("ink", 1.0), ("oil", 0.25)]]


def test_a_changed_file_is_refused_and_shown(place: Place) -> None:
    config = job(place, place.write("prompt\np\n"))
    place.run(config)
    recorded = json.loads((place.path / "out/_diffray/model.json").read_text())
    before = {name: sha256(path) for name, path in config.model.adapters.items()}
    assert recorded["adapters"] == before
    assert place.run(config).made == 0
    oil = sha256(lora(place, "oil", seed=7))
    with pytest.raises(JobConflict) as conflict:
        place.run(config)
    assert str(conflict.value).splitlines()[1:] == [f'  model.adapters.oil: "{before["oil"]}" -> "{oil}"']
    with pytest.raises(JobConflict, match=r"model\.adapters\.oil"):
        retry_rejected(str(place.path / "out"), models=FakeModels(), generate=in_process)


def test_a_file_that_changes_while_the_job_runs_is_refused(place: Place) -> None:
    """By the worker that would use the other one: its neighbour has recorded what the job began with."""
    config = job(place, place.write("prompt\np\nq\n"))

    def changing(*arguments: Any) -> Any:
        yield from in_process(*arguments)
        lora(place, "ink", seed=8)
        yield from in_process(*arguments)

    with pytest.raises(JobConflict, match=r"not the one the job began with:\n  model\.adapters: "):
        place.run(config, generate=changing)


def test_the_pages_of_a_dataset_tell(place: Place) -> None:
    place.run(job(place, place.write("prompt,adapters\np,ink:0.5\n")))
    card = (place.path / "out/README.md").read_text()
    assert "Adapters that a row's column `adapters` may name: `ink`, `oil`." in card
    assert '"adapters": "ink:0.5"' in (place.path / "out/gallery.html").read_text().replace('":"', '": "')


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_tables_in_json(place: Place, layout: str) -> None:
    encoding = {"layout": layout, "metadata": "jsonl"}
    place.run(job(place, place.write("prompt,adapters\np,ink:0.5\n"), encoding=encoding))
    [table] = [p for p in sorted((place.path / "out/data").rglob("*")) if p.suffix in (".tar", ".jsonl")]
    assert b'"adapters": [{"name": "ink", "weight": 0.5}]' in table.read_bytes()


def test_images_are_those_of_a_bare_engine(place: Place) -> None:
    """With the embedded model: none, one, and another weight of it, side by side."""
    ink = lora(place, "ink")
    table = place.write('prompt,seed,adapters\np,1,\np,1,ink\np,1,"ink:-0.5"\n')
    values = {"defaults": {"steps": 3}, "model": {"source": "embedded", "adapters": {"ink": ink}}}
    place.run(place.config(table, **values), models=Models())
    rows = place.rows()
    model = load_model("embedded", adapters={"ink": ink})
    requests = [
        ImageRequest(prompt="p", seed=1, steps=3, adapters=chosen) for chosen in (None, "ink", "ink:-0.5")
    ]
    for row, result in zip(rows, Engine(model).generate(requests), strict=True):
        assert result.image is not None
        made = encode_image(
            result.image,
            result.request,
            model="embedded",
            model_checksum=model.checksum,
            adapter_checksums={"ink": sha256(ink)},
        )
        assert row["image"]["bytes"] == made
    assert len({row["sha256"] for row in rows}) == 3
    said = [Image.open(io.BytesIO(row["image"]["bytes"])).info["parameters"] for row in rows]
    assert "<lora:" not in said[0]
    assert "<lora:ink:-0.5>" in said[2]
    assert f'Lora hashes: "ink: {sha256(ink)[:10]}"' in said[2]


def test_a_file_on_s3_is_fetched_once(
    place: Place, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFRAY_CACHE", str(tmp_path / "cache"))
    path, url = lora(place, "ink"), f"{s3.folder()}/ink.safetensors"
    s3.filesystem().put(path, url.removeprefix("s3://"))
    with broken(s3) as (proxy, through):
        options, models = ModelOptions(adapters={"ink": url}), Models({"s3": through.options()})
        assert models.identity(options)["adapters"] == {"ink": sha256(path)}
        models.config(options)
        models.fetch(options)
        model = models.open(options)
        model.engine.close()
        gets = [path for method, path, _ in proxy.requests if method == "GET" and "list-type" not in path]
    assert model.adapters == {"ink": sha256(path)}
    assert len(gets) == 1
