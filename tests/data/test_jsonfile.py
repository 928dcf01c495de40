"""A JSON file is read for what it holds, whatever its name: lines, an array, objects, a document."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data.problems import MAX_ROW_BYTES, Problem
from qlora_trainer.data.rows import passed_over, read_rows
from qlora_trainer.errors import ConfigError, DataError

ROWS = [{"instruction": f"a {n}", "output": "b", "data": "colours", "rows": [n]} for n in range(3)]
OTHER = [{"instruction": "held out", "output": "c"}]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def values(path: Path, split: str | None = "train") -> list[Any]:
    return [row.value for row in read_rows(path, split=split)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SHAPES = {
    "lines": lines(ROWS),
    "lines after a mark": "\ufeff" + lines(ROWS),
    "windows lines": lines(ROWS).replace("\n", "\r\n"),
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=1),
    "array with a row a line": "[" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "document": json.dumps({"version": "1", "tags": ["x"], "data": ROWS}),
    "pretty document": json.dumps({"version": "1", "tags": ["x"], "examples": ROWS, "n": 3}, indent=1),
    "splits": json.dumps({"validation": OTHER, "train": ROWS}),
    "pretty splits": json.dumps({"validation": OTHER, "train": ROWS}, indent=1),
    "rows and test": json.dumps({"test": OTHER, "data": ROWS}),
}


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "json.gz"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_under_every_name_gives_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    content = SHAPES[name].encode()
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert values(path) == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_split_chooses_a_list_and_what_is_not_read_is_said(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"validation": OTHER, "train": ROWS, "train_extra": ROWS[:1]}, indent=indent))
    assert values(path) == ROWS + ROWS[:1]
    assert values(path, "dev") == values(path, None) == OTHER
    assert values(path, "train_extra") == ROWS[:1]
    assert len(values(path, "all")) == 5
    assert passed_over(path, "train") == ["validation (1 rows)"]
    assert passed_over(path, "validation") == ["train (3 rows)", "train_extra (1 rows)"]
    with pytest.raises(DataError, match=r"has no split test; it has train, validation: set data\.split"):
        values(path, "test")
    with pytest.raises(ConfigError, match="slices and sums are for the hub"):
        values(path, "train[:10%]")


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"instruction": "a", "output": "b", "history": []}, {"text": "a", "notes": [{}]}],
)
def test_a_file_of_one_row_is_that_row(tmp_path: Path, row: Any, indent: int | None, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(json.dumps(row, indent=indent))
    assert values(path) == [row] and passed_over(path, "train") == []


def test_rows_of_an_array_have_a_line_or_a_number_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert [row.where for row in read_rows(path)] == [f"{path}:1[0]", f"{path}:1[1]", f"{path}:1[2]"]
    path.write_text("[\n" + ",\n".join(map(json.dumps, ROWS)) + "]")
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    path.write_text('[{"a": 1},\n{"a": 2}, {"a": 3}]')
    assert [row.where for row in read_rows(path)] == [f"{path}:1[0]", f"{path}:2", f"{path}:2[2]"]
    path.write_text('[{"a": 1}, {"a": }]')
    with pytest.raises(DataError, match=r"a\.json:1\[1\]: broken JSON"):
        values(path)


REFUSED = {
    "several lists": ({"a": [{}], "b": [{}]}, "holds the lists a, b; name one of them as data.split"),
    "pandas columns": ({"text": {"0": "a", "1": "b"}}, "holds columns, not rows.*orient='records'"),
    "pandas index": ({"0": {"text": "a"}, "1": {"text": "b"}}, "holds columns, not rows"),
    "pandas split": ({"columns": ["text"], "index": [0], "data": [["a"]]}, "holds columns, not rows"),
    "columns": ({"instruction": ["a", "b"], "output": ["c", "d"]}, "holds columns, not rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_document_without_rows_says_what_it_holds(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        values(path)


def test_a_broken_first_line_of_lines_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": \n{"text": "b"}\n')
    first, second = values(path)
    assert isinstance(first, Problem) and second == {"text": "b"}
    path.write_text('{"text": "' + "a" * MAX_ROW_BYTES + '"}\n{"text": "b"}\n')
    first, second = values(path)
    assert isinstance(first, Problem) and "longer than 10 MiB" in first.text and second == {"text": "b"}
    path.write_text('["q", "a"]\n["q", "a"]\n')
    assert [value.text for value in values(path)] == ["expected an object, found a list"] * 2


def test_json_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": ' + "[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        values(path)
