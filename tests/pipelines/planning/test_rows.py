"""Rows: values, ids, seeds, and everything that makes a row no image."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffray.pipelines import InvalidJob
from diffray.pipelines.planning.rows import derived_seed

from ..conftest import Place


def verdicts(place: Place) -> list[tuple[str | None, str]]:
    return [(row["field"], row["reason"]) for row in place.rows(folder="rejected")]


def test_one_row_gives_n_images_with_stable_ids_and_seeds(place: Place) -> None:
    table = place.write("id,prompt,n,seed\na,x,2,\nb,y,,10\nc,z,3,20\n")
    result = place.job(table, images_per_prompt=1, seed=5)
    assert (result.images, result.rejected) == (6, 0)
    seeds = {row["id"]: row["seed"] for row in place.rows()}
    assert seeds == {
        "a-0": derived_seed(5, "a-0"),
        "a-1": derived_seed(5, "a-1"),
        "b-0": 10,
        "c-0": 20,
        "c-1": 21,
        "c-2": 22,
    }


def test_derived_ids_survive_growth_and_tell_repetitions_apart(place: Place) -> None:
    first = place.write("prompt\nsame\nother\nsame\n", "first.csv")
    grown = place.write("prompt\nsame\nother\nsame\nnew\nsame\n", "grown.csv")
    place.job(first, "one")
    place.job(grown, "two")
    one, two = place.rows("one"), place.rows("two")
    assert [row["id"] for row in two][:3] == [row["id"] for row in one]
    assert [row["seed"] for row in two][:3] == [row["seed"] for row in one]
    assert len({row["id"] for row in two}) == 5


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("width", "abc", "integer"),
        ("width", "0", "8..8192"),
        ("width", "-8", "8..8192"),
        ("width", "20", "multiple of 8"),
        ("height", "1000000000", "8..8192"),
        ("steps", "0", "1..1000"),
        ("steps", "1.5", "integer"),
        ("guidance_scale", "nan", "[0, 100]"),
        ("guidance_scale", "inf", "[0, 100]"),
        ("guidance_scale", "-1", "[0, 100]"),
        ("seed", "-1", "0.."),
        ("seed", str(2**63), "0.."),
        ("n", "0", "1..100000"),
        ("n", "many", "integer"),
        ("output", "latents", "makes images"),
        ("strength", "0.5", "without an init_image"),
        ("paste_back", "perhaps", "true or false"),
        ("id", "x" * 501, "1..500"),
    ],
)
def test_a_bad_value_rejects_its_row_only(place: Place, column: str, value: str, reason: str) -> None:
    table = place.write(f"prompt,{column}\ngood,\nbad,{value}\nfine,\n")
    result = place.job(table)
    assert (result.images, result.rejected) == (2, 1)
    [row] = place.rows(folder="rejected")
    assert (row["field"], row["stage"], row["attempts"], row["line"]) == (column, "plan", 0, 3)
    assert reason in row["reason"]
    assert row["prompt"] == "bad"


def test_bad_csv_lines_become_rejected_rows_with_their_line(place: Place) -> None:
    table = place.write(b'prompt,label\nok,1\n\xff\xfe,2\na,b,c\nshort\n"x" y,3\nlast,4\n"open,5\n')
    result = place.job(table)
    assert (result.images, result.rejected) == (2, 5)
    assert [row["line"] for row in place.rows(folder="rejected")] == [3, 4, 5, 6, 8]
    assert [row["prompt"] for row in place.rows()] == ["ok", "last"]
    assert {field for field, _ in verdicts(place)} == {"row"}


def test_bad_json_lines_become_rejected_rows_with_their_line(place: Place) -> None:
    deep = b"[" * 100_000
    lines = [
        b'{"prompt": "ok"}',
        b"{",
        b"[1]",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        deep,
        b'{"prompt": 5}',
    ]
    table = place.write(b"\n".join(lines), "rows.jsonl")
    result = place.job(table)
    assert (result.images, result.rejected) == (1, 6)
    assert [row["line"] for row in place.rows(folder="rejected")] == [2, 3, 4, 5, 6, 7]


def test_prompts_of_every_kind_round_trip(place: Place) -> None:
    prompts = ["", "   ", "a\x00b", "\u202eright to left", "😀 漢字", "=cmd|x", "two\nlines", '"quoted"']
    table = place.write("\n".join(json.dumps({"prompt": p}) for p in [*prompts, None]), "rows.jsonl")
    result = place.job(table)
    assert [row["prompt"] for row in place.rows()] == prompts
    assert result.rejected == 1
    assert verdicts(place)[0][0] == "prompt"


def test_empty_cells_mean_absent_but_an_empty_prompt_is_one(place: Place) -> None:
    table = place.write("prompt,negative_prompt,width,sampler\n,,,\n")
    place.job(table, defaults={"width": 32})
    [row] = place.rows()
    assert (row["prompt"], row["negative_prompt"], row["width"], row["sampler"]) == ("", None, 32, "euler")


def test_text_parquet_and_folders_are_inputs_too(place: Place) -> None:
    place.job(place.write("one\n\ntwo\n", "p.txt"), "text")
    assert [row["prompt"] for row in place.rows("text")] == ["one", "two"]
    (place.path / "in").mkdir()
    for name, prompt in (("b", "second"), ("a", "first")):
        table = pa.table({"prompt": [prompt], "when": pa.array([0], pa.timestamp("ms")), "steps": [3.0]})
        pq.write_table(table, place.path / "in" / f"{name}.parquet")
    place.job(str(place.path / "in"), "folder")
    rows = place.rows("folder")
    assert [(row["prompt"], row["steps"]) for row in rows] == [("first", 3), ("second", 3)]
    assert str(rows[0]["when"]) == "1970-01-01 00:00:00"


def test_user_columns_are_carried_with_their_types(place: Place) -> None:
    rows = [
        {"prompt": "a", "tags": ["x"], "score": 1, "mixed": 1, "model": "mine", "sha256": "theirs"},
        {"prompt": "b", "tags": [], "score": 0.5, "mixed": "two", "late": True},
    ]
    place.job(place.write("\n".join(map(json.dumps, rows)), "rows.jsonl"))
    first, second = place.rows()
    assert (first["tags"], first["score"], first["mixed"]) == (["x"], 1.0, "1")
    assert (second["tags"], second["score"], second["mixed"], second["late"]) == ([], 0.5, '"two"', True)
    assert (first["input_model"], first["input_sha256"]) == ("mine", "theirs")
    assert (first["model"], len(first["sha256"])) == ("fake", 64)


def test_rejected_rows_and_data_can_be_fed_back(place: Place) -> None:
    table = place.write("prompt,n,width,seed,label\nPOISON,3,,5,x\ngood,2,,,y\nbad,2,nine,,z\n")
    place.job(table, "one")
    assert len(place.rows("one", "rejected")) == 5
    place.job(str(place.path / "one" / "rejected"), "two")
    one, two = place.rows("one", "rejected"), place.rows("two", "rejected")
    keys = ("id", "seed", "reason", "label", "prompt", "width")
    assert [[row[k] for k in keys] for row in two] == [[row[k] for k in keys] for row in one]
    place.job(str(place.path / "one" / "data"), "three")
    assert [(r["id"], r["seed"], r["sha256"], r["label"]) for r in place.rows("three")] == [
        (r["id"], r["seed"], r["sha256"], r["label"]) for r in place.rows("one")
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\nx\n", "no column 'prompt'; it has text"),
        (
            "a.csv",
            "prompt,label\nx\ny\n",
            "no readable row, the first is a.csv:2: line 2 has 1 cells, the header has 2",
        ),
        ("a.jsonl", "\n{broken\n", "no readable row, the first is a.jsonl:2: line 2 is no JSON: Expecting"),
        ("a.jsonl", "{}\n", "no column 'prompt'; it has none"),
        ("a.csv", "", "header"),
        ("a.csv", "prompt,prompt\nx,y\n", "distinct"),
        ("a.csv", "prompt,n,images_per_prompt\nx,1,1\n", "mean the same"),
        ("a.csv", "id,prompt\nk,x\nj,y\nk,z\n", "'k' at a.csv:2, a.csv:4"),
        (
            "a.csv",
            "prompt,row_id,variant,index\nx,a,v,3\ny,a,v,3\nz,b,,0\nz,b,,0\n",
            r"all\): row_id 'a', variant 'v', index 3 at a.csv:2, a.csv:3; row_id 'b', index 0 at a.csv:4, a.csv:5",
        ),
        ("a.xlsx", "x", "allowed endings"),
        ("a.parquet", "not parquet", "Parquet"),
    ],
)
def test_an_unusable_table_starts_nothing(place: Place, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        place.job(place.write(text, name))
    assert not place.begun()


def test_a_named_column_that_is_not_there_starts_nothing(place: Place) -> None:
    table = place.write("prompt,label,seed\nx,y,3\n")
    with pytest.raises(InvalidJob) as caught:
        place.job(table, columns={"seed": "sedd"})
    assert str(caught.value) == "columns.seed: the input has no column 'sedd'; it has prompt, label, seed"
    with pytest.raises(InvalidJob, match=r"columns\.prompt: the input has no column 'caption'"):
        place.job(table, columns={"prompt": "caption"})
    empty = place.write("prompt,own\nx,\n", "empty.csv")
    assert place.job(empty, columns={"seed": "own"}).images == 1, "a column may be empty, as with a limit"


def test_rows_that_diffray_wrote_are_read_by_its_names_whatever_columns_the_job_names(place: Place) -> None:
    options = {"columns": {"prompt": "caption", "seed": "own"}}
    place.job(place.write("caption,own\nPOISON,3\n"), "one", **options)
    place.job(str(place.path / "one/rejected"), "two", **options)
    [one], [two] = place.rows("one", "rejected"), place.rows("two", "rejected")
    assert [two[k] for k in ("id", "prompt", "seed")] == [one[k] for k in ("id", "prompt", "seed")]


def test_a_corrected_table_may_use_the_same_output(place: Place) -> None:
    with pytest.raises(InvalidJob):
        place.job(place.write("id,prompt\nk,x\nk,y\n"))
    assert place.job(place.write("id,prompt\nk,x\nj,y\n")).images == 2


def test_a_missing_input_and_an_output_that_holds_it_are_refused(place: Place) -> None:
    with pytest.raises(InvalidJob, match="no such file"):
        place.job(str(place.path / "nowhere.csv"))
    table = place.write("prompt\nx\n")
    with pytest.raises(InvalidJob, match="holds the input"):
        place.job(table, ".")


def test_no_rows_is_a_finished_job(place: Place) -> None:
    result = place.job(place.write("prompt\n"))
    assert (result.images, result.rejected, result.shards) == (0, 0, 0)
    assert (place.path / "out" / "README.md").exists()


def test_shards_are_bounded_by_work(place: Place) -> None:
    table = place.write("prompt,steps\n" + "x,10\n" * 4 + "y,100\n" + "z,1\n")
    result = place.job(table, shards={"images": 100, "work": 16 * 16 * 25})
    sizes = [len(part) for part in [["x", "x"], ["x", "x"], ["y"], ["z"]]]
    commits = [json.loads((place.path / f"out/_diffray/commits/{i:05d}.json").read_text()) for i in range(4)]
    assert result.shards == 4
    assert [commit["images"] for commit in commits] == sizes


def test_bytes_are_never_taken_for_text(place: Place) -> None:
    """Tables of other tools hold text as bytes; what stays in the input is no prompt."""
    table = pa.table(
        {"prompt": [b"a", b"b"], "caption": [b"x", b"y"], "text": ["p", "q"], "id": [b"1", b"2"]}
    )
    pq.write_table(table, place.path / "ids.parquet")
    pq.write_table(table.drop_columns("id"), place.path / "t.parquet")
    for name, file, values, reason in (
        (
            "prompt",
            "t.parquet",
            {},
            "got bytes (input:t.parquet#row=0&column=prompt), allowed is a plain value",
        ),
        (
            "template",
            "t.parquet",
            {"templates": {"prompt": "a {caption}"}},
            "'caption', this row has bytes there",
        ),
        ("id", "ids.parquet", {"columns": {"prompt": "text"}}, "allowed is text of 1..500 characters"),
    ):
        assert place.job(str(place.path / file), name, **values).rejected == 2
        row = place.rows(name, folder="rejected")[0]
        assert reason in row["reason"]
        assert row["prompt"] in (None, "p"), "fed back, it would be a prompt"
