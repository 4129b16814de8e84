"""Types of the user's columns: every value arrives as it was, whatever the others are."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from diffray.pipelines.inputs.carried import UserColumns
from diffray.pipelines.outputs.tables import parquet

WIDE = 2**53 + 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2.5], pa.float64()),
        ([2**53, 0.5], pa.float64()),
        ([WIDE, 2], pa.int64()),
        ([WIDE, 0.5], None),
        ([0.5, -WIDE], None),
        ([[1, WIDE], [0.5]], None),
        ([{"a": WIDE}, {"a": 0.5}], None),
        ([{"a": WIDE, "b": 0.5}], pa.struct([("a", pa.int64()), ("b", pa.float64())])),
        ([-1, 2**63 + 5], None),
        ([2**63 + 5, 0.5], None),
        ([10**400, 0.5], None),
        ([True, "x"], None),
        ([None, None], pa.string()),
    ],
)
@pytest.mark.parametrize("between", [0, 1500])
def test_values_that_no_type_holds_become_json(
    values: list[Any], kind: pa.DataType | None, between: int
) -> None:
    """Also when so many rows stand between them that their types are settled apart."""
    rows: list[Any] = [values[0], *[None] * between, *values[1:]]
    columns = UserColumns(None, {})
    for value in rows:
        columns.observe({"x": value})
    columns.finish(pa.schema([]))
    assert columns.schema.field("x").type == (pa.string() if kind is None else kind)
    parquet([columns.pick({"x": value}) for value in rows], columns.schema)  # does not raise
