"""Files of every kind give the same rows, with the lines they came from; broken ones say where."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.data.lines import CHUNK
from qlora_trainer.data.problems import Problem
from qlora_trainer.data.rows import read_rows
from qlora_trainer.errors import DataError

ROWS = [
    {"text": "하나 🙂", "more": "a,b"},
    {"text": 'two "quoted"\nlines', "more": ""},
    {"text": "three", "more": "x"},
]


def values(path: Path, **options: str) -> list[object]:
    return [row.value for row in read_rows(path, **options)]


def jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")


def array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def wrapped(path: Path) -> None:
    path.write_text(json.dumps({"canary": "x [{", "examples": ROWS, "n": 12}), encoding="utf-8")


def with_bom(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8-sig")


def table(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "more"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


KINDS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": jsonl,
    "lines.json": jsonl,
    "array.json": array,
    "wrapped.json": wrapped,
    "bom.json": with_bom,
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    KINDS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    squeezed = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    }[ending](content)
    path = tmp_path / (name + ending)
    path.write_bytes(squeezed)
    assert values(path) == ROWS
    path.write_bytes(squeezed[: len(squeezed) // 2])
    with pytest.raises(DataError, match=r"damaged|broken"):
        values(path)


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    lines = {}
    for name in ("rows.jsonl", "array.json", "rows.csv"):
        KINDS[name](tmp_path / name)
        lines[name] = [row.line for row in read_rows(tmp_path / name)]
    assert lines == {"rows.jsonl": [1, 2, 3], "array.json": [2, 6, 10], "rows.csv": [2, 3, 5]}


def test_arrays_longer_than_the_window_are_streamed(tmp_path: Path) -> None:
    rows = [{"text": "x" * (n * 7 % 5000), "n": n} for n in range(1000)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(rows, indent=1))
    assert path.stat().st_size > 2 * CHUNK
    read = list(read_rows(path))
    assert [row.value for row in read] == rows
    assert [row.line for row in read] == [2 + 4 * n for n in range(1000)]


def test_text_by_line_paragraph_and_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert values(path) == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert values(path, sample_by="paragraph") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert values(path, sample_by="document") == [{"text": "one\ntwo\n\n\nthree"}]


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"text": "a"', "broken JSON at column 13"),
    "list": (b'["a"]', "expected an object, found a list"),
    "latin-1": (b'{"text": "caf\xe9"}', "not UTF-8 .byte 0xe9 at column 14"),
    "nul": (b'{"text": "a\0b"}', "NUL byte"),
    "long": (b'{"text": "' + b"a" * (10 * 2**20) + b'"}', "longer than 10 MiB"),
    "deep": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_reported_and_the_next_one_read(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    first, second, third = read_rows(path)
    assert (first.value, third.value) == ({"text": "a"}, {"text": "c"})
    assert isinstance(second.value, Problem) and second.where == f"{path}:2"
    assert re.search(message, second.value.text)


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "cut": ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', r":3: broken JSON: the file ends"),
    "comma": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r":2: broken JSON: expected ',' or '\]'"),
    "quote": ("a.json", b'[{"text": "a"},\n{"text": b}]', r":2: broken JSON: Expecting value"),
    "tail": ("a.json", b'[{"text": "a"}]\n{}', r":2: broken JSON: text after the end"),
    "number": ("a.json", b"12", "expected an array of objects"),
    "array utf8": ("a.json", b'[{"text": "caf\xe9"}]', "not UTF-8"),
    "array nul": ("a.json", b'[{"text": "a"},\n{"text": "a\0"}]', r":2: .*NUL"),
    "csv quote": ("a.csv", b'text,more\n"a"b,c\n', r":2: broken CSV"),
    "parquet": ("a.parquet", b"nothing of the kind", "damaged"),
    "gzip": ("a.jsonl.gz", b"nothing of the kind", "damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_on_says_where(tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        values(tmp_path / file)


def test_a_row_of_the_wrong_width_or_bytes_in_csv_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,more\na,b\na,b,c\ncaf\xe9,b\nc,d\n")
    read = list(read_rows(path))
    assert [row.value for row in read if isinstance(row.value, dict)] == [
        {"text": "a", "more": "b"},
        {"text": "c", "more": "d"},
    ]
    problems = {row.line: row.value.text for row in read if isinstance(row.value, Problem)}
    assert "3 fields, the header has 2" in problems[3] and "not UTF-8" in problems[4]


def test_an_array_with_a_row_over_10_mib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "' + "a" * (11 * 2**20))
    with pytest.raises(DataError, match="longer than 10 MiB"):
        values(path)
