"""A file that is plainly not what its name says is refused once, with what to do."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.data.rows import read_rows
from qlora_trainer.errors import DataError, MissingInputError


def table() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), sink)
    return sink.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FOREIGN = {
    "pointer": ("a.parquet", POINTER, "a Git LFS pointer, not the data; fetch the data with git lfs pull"),
    "pointer as lines": ("a.jsonl", POINTER, "a Git LFS pointer"),
    "utf-16": ("a.csv", "text\na\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "gzip": ("a.jsonl", gzip.compress(b'{"text": "a"}'), "compressed by gzip; add .gz to its name"),
    "parquet": ("a.json", table(), "Parquet; name it .parquet"),
    "zip": ("a.jsonl", b"PK\x03\x04 and so on", "a zip archive; unpack it"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_under_a_false_name_is_refused_once(tmp_path: Path, name: str) -> None:
    file, content, message = FOREIGN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / file))


def test_a_file_that_is_gone_is_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="cannot be read"):
        list(read_rows(tmp_path / "a.jsonl"))
