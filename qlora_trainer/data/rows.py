"""Files to rows: every row of a JSON, JSONL, CSV, TSV, Parquet or text file, with the line it came from.

Comes in: the path of one file, plain or compressed (.gz .bz2 .xz .zst). Goes out: an iterator of
`Row`, whose value is a dict of columns, or a `Problem` where the line could not be read. Memory is
constant: one row and one read buffer, whatever the size of the file. What the columns mean is
decided in `formats.py`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_trainer.data.problems import MAX_ROW_BYTES, Problem, kind
from qlora_trainer.errors import DataError

CHUNK = 1 << 20  # characters of a JSON array read at a time
WRAPPERS = {"data", "examples", "instances", "rows"}  # a lone object with one of these holds the rows there
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowInvalid, pa.ArrowIOError)


class Row(NamedTuple):
    """One row of one file; `line` counts from 1 (in Parquet and hub data it is the row's number)."""

    file: str
    line: int
    value: dict[str, Any] | Problem

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(path: Path, sample_by: str = "line") -> Iterator[Row]:
    """All rows of one file, in order.

    `sample_by` is for text files: a row is a `line`, a `paragraph` (blank line between) or the
    whole `document`. Raises DataError where the rest of the file cannot be made sense of.
    """
    name = str(path)
    try:
        for line, value in _reader(path)(path, sample_by):
            yield Row(name, line, value)
    except DAMAGED as error:
        raise DataError(
            f"{name}: damaged or not what its name says ({error}); fetch the file again"
        ) from error


def supported(path: Path) -> bool:
    """Whether the file's name ends in something `read_rows` can read."""
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[int, dict[str, Any] | Problem]]]:
    if (reader := READERS.get(_suffix(path))) is None:
        known = " ".join(READERS)
        raise DataError(f"{path}: unknown kind of file; name it {known} (also with {' '.join(COMPRESSIONS)})")
    return reader


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's content, decompressed by the ending of its name."""
    raw: Any
    match path.suffix.lower():
        case ".gz":
            raw = gzip.GzipFile(path, "rb")
        case ".bz2":
            raw = bz2.BZ2File(path, "rb")
        case ".xz":
            raw = lzma.LZMAFile(path, "rb")  # noqa: SIM115 (the caller closes it)
        case ".zst":
            raw = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        case _:
            raw = io.FileIO(path, "rb")
    return io.BufferedReader(raw, CHUNK)


Values = Iterator[tuple[int, dict[str, Any] | Problem]]


def _lines(path: Path) -> Iterator[tuple[int, str | Problem]]:
    """Decoded lines without their ends; a line that is not UTF-8, holds NUL or is too long is a Problem."""
    with open_bytes(path) as stream:
        number = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):  # skip the rest of it without holding it
                    raw = stream.readline(CHUNK)
                yield number, Problem("", f"longer than {MAX_ROW_BYTES >> 20} MiB")
                continue
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            yield number, _decode(raw)


def _decode(raw: bytes) -> str | Problem:
    if b"\0" in raw:
        return Problem("", "NUL byte")
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Problem("", f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")


def _parse_object(text: str) -> dict[str, Any] | Problem:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Problem("", f"broken JSON at column {error.colno}: {error.msg}")
    except RecursionError:
        return Problem("", "JSON nested too deeply")
    return _as_object(value)


def _as_object(value: Any) -> dict[str, Any] | Problem:
    return value if isinstance(value, dict) else Problem("", f"expected an object, found {kind(value)}")


def _read_jsonl(path: Path, _: str) -> Values:
    for number, line in _lines(path):
        if isinstance(line, Problem):
            yield number, line
        elif line and not line.isspace():
            yield number, _parse_object(line)


def _read_json(path: Path, sample_by: str) -> Values:
    """An array of objects, streamed; JSON lines under a .json name; or one object that wraps the array."""
    with open_bytes(path) as stream:
        head = stream.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"{"):
        first = _parse_object(head.split(b"\n", 1)[0].decode(errors="replace"))
        if isinstance(first, dict) and not WRAPPERS & set(first):
            yield from _read_jsonl(path, sample_by)
            return
    array = _JsonStream(path)
    try:
        yield from array.objects()
    finally:
        array.close()


class _JsonStream:
    """Objects of one JSON document, decoded one at a time from a moving window of text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")
        self.decoder = json.JSONDecoder()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def close(self) -> None:
        self.stream.close()

    def objects(self) -> Values:
        match self._peek():
            case "":
                return
            case "[":
                self._skip(1)
                yield from self._elements()
            case "{":
                yield from self._wrapped()
            case other:
                raise self._broken(f"expected an array of objects, found {other!r}")
        if self._peek():
            raise self._broken("text after the end of the JSON document")

    def _elements(self) -> Values:
        """Up to and with the closing bracket."""
        if self._peek() == "]":
            self._skip(1)
            return
        while True:
            self._peek()
            line = self.line
            yield line, _as_object(self._value())
            match self._peek():
                case ",":
                    self._skip(1)
                case "]":
                    self._skip(1)
                    return
                case "":
                    raise self._broken("the file ends in the middle of the array")
                case other:
                    raise self._broken(f"expected ',' or ']' after an object, found {other!r}")

    def _wrapped(self) -> Values:
        """`{"canary": "…", "examples": [{…}, …]}`: the rows are the one list of objects."""
        self._skip(1)
        found = False
        while self._peek() != "}":
            key = self._value()
            if not isinstance(key, str) or self._peek() != ":":
                raise self._broken('expected "key": value')
            self._skip(1)
            if self._peek() == "[" and not found:
                found = True
                self._skip(1)
                yield from self._elements()
            else:
                self._value()
            if self._peek() == ",":
                self._skip(1)
        self._skip(1)
        if not found:
            raise self._broken("an object without a list of rows; expected an array of objects")

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            rest = len(self.text)
            while self.at < rest and (character := self.text[self.at]) in " \t\r\n":
                self.line += character == "\n"
                self.at += 1
            if self.at < rest:
                return self.text[self.at]
            if not self._more():
                return ""

    def _skip(self, count: int) -> None:
        self.at += count

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise self._broken(
                        f"row longer than {MAX_ROW_BYTES >> 20} MiB, or {error.msg}"
                    ) from error
                if not self._more():
                    self.line += self.text.count("\n", self.at, error.pos)
                    raise self._broken(error.msg) from error
                continue
            if end == len(self.text) and self._more():
                continue  # a number may go on in the next chunk
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def _more(self) -> bool:
        try:
            chunk = self.stream.read(CHUNK)
        except UnicodeDecodeError as error:
            raise self._broken(f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from error
        if "\0" in chunk:
            self.line += self.text.count("\n", self.at) + chunk.count("\n", 0, chunk.index("\0"))
            raise self._broken("NUL byte")
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def _broken(self, problem: str) -> DataError:
        return DataError(f"{self.path}:{self.line}: broken JSON: {problem}")


def _read_csv(path: Path, _: str, delimiter: str = ",") -> Values:
    """A header line, then rows; quoted fields may run over lines. Empty lines are ignored."""
    problems: list[Problem] = []

    def decoded() -> Iterator[str]:
        for _, line in _lines(path):
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
            yield reader.line_num, problems.pop()
            problems.clear()
        elif fields is None:
            return
        elif header is None:
            header = fields
        elif fields:
            if len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            else:
                yield start, Problem("", f"{len(fields)} fields, the header has {len(header)}")
        start = reader.line_num + 1


def _read_tsv(path: Path, sample_by: str) -> Values:
    return _read_csv(path, sample_by, delimiter="\t")


def _read_parquet(path: Path, _: str) -> Values:
    if path.suffix.lower() in COMPRESSIONS:
        raise DataError(f"{path}: Parquet is compressed inside; unpack the file")
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=512):
            for value in batch.to_pylist():
                number += 1
                yield number, value


def _read_text(path: Path, sample_by: str) -> Values:
    block: list[str] = []
    size = start = 0
    for number, line in _lines(path):
        if isinstance(line, Problem):
            yield number, line
            continue
        if sample_by == "line":
            if line.strip():
                yield number, {"text": line}
            continue
        if sample_by == "paragraph" and not line.strip():
            if block:
                yield start, {"text": "\n".join(block)}
            block = []
            continue
        if not block:
            start, size = number, 0
        size += len(line) + 1
        if size <= MAX_ROW_BYTES:
            block.append(line)
        elif size - len(line) - 1 <= MAX_ROW_BYTES:  # the line that crosses the limit
            yield start, Problem("", f"longer than {MAX_ROW_BYTES >> 20} MiB")
    if block and any(line.strip() for line in block):
        yield start, {"text": "\n".join(block)}


READERS: dict[str, Callable[[Path, str], Values]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
