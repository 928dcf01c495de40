"""Parquet and Arrow give the rows that JSON gives: no null that Arrow put there, no NaN, JSON parsed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.data.options import Source
from qlora_trainer.data.rows import read_rows
from qlora_trainer.data.sources import Hub
from qlora_trainer.data.tables import row_change


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(*calls: dict[str, Any]) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "tool", "content": "ok", "name": "add"},
        {"role": "assistant", "content": "Done."},
    ]
    return {"messages": turns, "note": None}


ROWS = [row(call("weather", town="Ulm")), row(call("add", a=1, b=2), call("now")), row(call("add", a=1))]


def values(path: Path) -> list[Any]:
    return [found.value for found in read_rows(path)]


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    new = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_objects_have_the_keys_they_have_in_json(tmp_path: Path, name: str) -> None:
    path = write(pa.Table.from_pylist(ROWS), tmp_path / name)
    assert values(path) == ROWS
    assert [found.line for found in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_json_columns_are_parsed_and_keep_their_nulls(tmp_path: Path, name: str) -> None:
    told = [{"town": "Ulm", "days": None}, [1]]
    column = pa.array([[json.dumps(item) for item in told], None]).cast(pa.list_(pa.json_()))
    assert values(write(pa.table({"messages": column}), tmp_path / name)) == [
        {"messages": told},
        {"messages": None},
    ]


def test_maps_are_objects_with_all_their_keys(tmp_path: Path) -> None:
    column = pa.array(
        [[("a", {"x": 1}), ("b", None)]], pa.map_(pa.string(), pa.struct({"x": pa.int64(), "y": pa.int64()}))
    )
    assert values(write(pa.table({"m": column}), tmp_path / "a.parquet")) == [
        {"m": {"a": {"x": 1}, "b": None}}
    ]


def test_nan_inside_an_object_is_a_key_that_is_not_there(tmp_path: Path) -> None:
    path = write(pa.table({"m": [{"a": math.nan, "b": 1.0}]}), tmp_path / "a.parquet")
    assert values(path) == [{"m": {"b": 1.0}}]


def test_rows_of_the_hub_are_told_by_their_schema_or_without() -> None:
    import datasets

    hub = Hub(Source(path="some/data"))
    hub._data = datasets.Dataset.from_list(ROWS)
    assert [found.value for found in hub.rows()] == ROWS
    mixed = pa.schema({"messages": pa.list_(pa.json_())})
    told = {"messages": [{"a": None}]}
    assert row_change(mixed, parsed=True)(told) == told
    assert row_change(None)({**told, "x": None}) == {"messages": [{}], "x": None}
