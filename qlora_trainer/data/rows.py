"""Files to rows: every row of a JSON, JSONL, CSV, TSV, Parquet, Arrow or text file, with its place.

Comes in: the path of one file, plain or compressed (.gz .bz2 .xz .zst). Goes out: an iterator of
`Row`, whose value is a dict of columns, or a `Problem` where the line could not be read. Memory is
constant: one row and one read buffer, whatever the size of the file. What the columns mean is
decided in `formats.py`.
"""

from __future__ import annotations

import csv
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from qlora_trainer.data import jsonfile
from qlora_trainer.data.lines import COMPRESSIONS, Found, place, read_lines, refuse_foreign
from qlora_trainer.data.problems import MAX_ROW_BYTES, Problem
from qlora_trainer.data.tables import read_arrow, read_parquet
from qlora_trainer.errors import DataError, MissingInputError

# Tables can say "the same again, 10^9 times" in some bytes.
MOST_ROWS, ROWS_A_BYTE = 1 << 18, 2
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, pa.ArrowException, OSError)  # the last: gzip, bz2, Arrow


class Row(NamedTuple):
    """One row of one file; `line` counts from 1 (in Parquet, Arrow and hub data it is the row's number).

    `element` counts those of a JSON array from 0, where several begin on one line.
    """

    file: str
    line: int
    value: dict[str, Any] | Problem
    element: int | None = None

    @property
    def where(self) -> str:
        return place(self.file, self.line, self.element)


def read_rows(path: Path, sample_by: str = "line", split: str | None = "train") -> Iterator[Row]:
    """All rows of one file, in order.

    `sample_by` is for text files: a row is a `line`, a `paragraph` (blank line between) or the
    whole `document`. `split` is for JSON documents that hold several. Raises DataError where the rest of
    the file cannot be made sense of, MissingInputError where it cannot be opened.
    """
    name = str(path)
    with _told(path):
        refuse_foreign(path)
        most = MOST_ROWS + ROWS_A_BYTE * path.stat().st_size
        for number, found in enumerate(reader_of(path)(path, sample_by, split)):
            if number > most:
                raise DataError(f"{name}: over {most:,} rows in a file of so few bytes: no data is like that")
            yield Row(name, *found)


def passed_over(path: Path, split: str | None) -> list[str]:
    """What of the file `split` does not choose: names of lists with the number of their rows."""
    if _suffix(path) not in JSON_ENDINGS:
        return []
    with _told(path):
        return jsonfile.passed_over(path, split, JSON_ENDINGS[_suffix(path)])


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What libraries raise over a file, as one line of ours."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise DataError(
            f"{path}: damaged or not what its name says ({error}); fetch the file again"
        ) from error


def supported(path: Path) -> bool:
    """Whether the file's name ends in something `read_rows` can read."""
    return _suffix(path) in READERS


def is_text(path: Path) -> bool:
    """Whether the file holds text for people, whose rows have no columns."""
    return _suffix(path) in TEXT_ENDINGS


def stem(path: Path) -> str:
    """The file's name without its endings."""
    name = path.name
    for ending in (*COMPRESSIONS, *READERS):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).suffix


def reader_of(path: Path) -> Reader:
    """What reads files of this name. Raises DataError for a kind that is not known."""
    if (reader := READERS.get(_suffix(path))) is None:
        known = " ".join(READERS)
        raise DataError(f"{path}: unknown kind of file; name it {known} (also with {' '.join(COMPRESSIONS)})")
    return reader


def _read_csv(path: Path, delimiter: str) -> Iterator[Found]:
    """A header line, then rows; quoted fields may run over lines. Empty lines are ignored."""
    problems: list[Problem] = []

    def decoded() -> Iterator[str]:
        for _, line in read_lines(path):
            if isinstance(line, Problem):
                problems.append(line)
            yield "\n" if isinstance(line, Problem) else line + "\n"

    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{start}: broken CSV: {error}") from error
        if problems:
            yield Found(reader.line_num, problems.pop())
            problems.clear()
        elif fields is None:
            return
        elif header is None:
            header = fields
        elif fields:
            if len(fields) == len(header):
                yield Found(start, dict(zip(header, fields, strict=True)))
            else:
                yield Found(start, Problem("", f"{len(fields)} fields, the header has {len(header)}"))
        start = reader.line_num + 1


def _read_text(path: Path, sample_by: str) -> Iterator[Found]:
    block: list[str] = []
    size = start = 0
    for number, line in read_lines(path):
        if isinstance(line, Problem):
            yield Found(number, line)
            continue
        if sample_by == "line":
            if line.strip():
                yield Found(number, {"text": line})
            continue
        if sample_by == "paragraph" and not line.strip():
            if block:
                yield Found(start, {"text": "\n".join(block)})
            block = []
            continue
        if not block:
            start, size = number, 0
        size += len(line) + 1
        if size <= MAX_ROW_BYTES:
            block.append(line)
        elif size - len(line) - 1 <= MAX_ROW_BYTES:  # the line that crosses the limit
            yield Found(start, Problem("", f"longer than {MAX_ROW_BYTES >> 20} MiB"))
    if block and any(line.strip() for line in block):
        yield Found(start, {"text": "\n".join(block)})


Reader = Callable[[Path, str, str | None], Iterator[Found]]
TEXT_ENDINGS = (".txt", ".md")
JSON_ENDINGS = {".json": False, ".jsonl": True, ".ndjson": True}  # whether it promises a row on each line
READERS: dict[str, Reader] = {
    ".json": lambda path, _, split: jsonfile.read_json(path, split, lines=False),
    ".jsonl": lambda path, _, split: jsonfile.read_json(path, split, lines=True),
    ".ndjson": lambda path, _, split: jsonfile.read_json(path, split, lines=True),
    ".csv": lambda path, *_: _read_csv(path, ","),
    ".tsv": lambda path, *_: _read_csv(path, "\t"),
    ".parquet": lambda path, *_: read_parquet(path),
    ".arrow": lambda path, *_: read_arrow(path),
    ".txt": lambda path, sample_by, _: _read_text(path, sample_by),
    ".md": lambda path, sample_by, _: _read_text(path, sample_by),
}
