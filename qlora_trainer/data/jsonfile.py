"""JSON files to rows, whatever their name: lines, an array, objects in a row, or a document of lists.

The first bytes tell which. An array is streamed: one element is decoded at a time from a moving window of
text. A lone object is a document if it holds lists of objects under names of splits (`"train"`) or in use for
rows (`"data"`), and one row if it has the columns of a format; it is read twice, to see what it holds and
then the lists that `data.split` chooses.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qlora_trainer.data.formats import known
from qlora_trainer.data.lines import CHUNK, Found, open_bytes, place, read_lines
from qlora_trainer.data.problems import MAX_ROW_BYTES, Problem, kind
from qlora_trainer.data.splits import choose, part_of
from qlora_trainer.errors import DataError
from qlora_trainer.system.untrusted import DEEPEST, check_depth, parse_json

ROWS_KEYS = ("data", "examples", "instances", "rows")  # a document with one of these holds its rows there


def read_json(path: Path, split: str | None, lines: bool) -> Iterator[Found]:
    """Every row; `lines` says that the file's name promises one on each line."""
    match _shape(path, lines):
        case "lines":
            yield from _read_lines(path)
        case "document":
            chosen = _chosen(path, split, lines)
            with closing(_Stream(path)) as stream:
                yield from stream.members(chosen) if chosen else stream.objects()
        case _:
            with closing(_Stream(path)) as stream:
                yield from stream.objects()


def passed_over(path: Path, split: str | None, lines: bool) -> list[str]:
    """The lists of a document that `split` does not choose, with their rows."""
    if _shape(path, lines) != "document" or not (chosen := _chosen(path, split, lines)):
        return []
    lists = _contents_of(path).lists
    return [f"{key} ({count:,} rows)" for key, count in lists.items() if key not in chosen]


def _shape(path: Path, lines: bool) -> str:
    """`lines`, `array`, `document` (one object) or `objects` (several, over lines)."""
    with open_bytes(path) as stream:
        head = stream.read(MAX_ROW_BYTES)
        more = bool(stream.read(1))
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        is_array = not lines or head[1:].lstrip()[:1] in (b"{", b"]", b"")
        return "array" if is_array else "lines"
    if not head.startswith(b"{"):
        return "lines" if lines or not head else "array"
    line, _, rest = head.partition(b"\n")
    if isinstance(_parse_object(line.decode(errors="replace")), dict):
        return "lines" if rest.strip() or more else "document"
    text = head.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "lines" if lines else "document"
    return "objects" if text[end:].lstrip().startswith("{") else "document"


def _read_lines(path: Path) -> Iterator[Found]:
    for number, line in read_lines(path):
        if isinstance(line, Problem):
            yield Found(number, line)
        elif line and not line.isspace():
            yield Found(number, _parse_object(line))


def _parse_object(text: str) -> dict[str, Any] | Problem:
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        return Problem("", f"broken JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return Problem("", f"broken JSON: {error}")
    return _as_object(value)


def _as_object(value: Any) -> dict[str, Any] | Problem:
    return value if isinstance(value, dict) else Problem("", f"expected an object, found {kind(value)}")


class _Contents(NamedTuple):
    """A lone object: how long its lists of objects are, and the whole, with one element of each list."""

    lists: dict[str, int]
    outline: dict[str, Any]


def _chosen(path: Path, split: str | None, lines: bool) -> list[str]:
    """The lists of a lone object that hold its rows; none if the object is a row itself.

    Raises DataError where it is neither, or holds several lists that no name tells apart.
    """
    lists, outline = _contents_of(path)
    named = {key: [key] for key in lists if key in ROWS_KEYS or part_of([key]) or key == split}
    if named:
        return choose(named, split, str(path))
    if _columnar(outline):
        raise DataError(
            f"{path}: holds columns, not rows; write it as rows (in pandas: orient='records', lines=True)"
        )
    if lines or known(outline) is not None:
        return []
    if len(lists) > 1:
        raise DataError(f"{path}: holds the lists {', '.join(lists)}; name one of them as data.split")
    return list(lists)


def _columnar(outline: dict[str, Any]) -> bool:
    """Whether it is what pandas and `to_dict` write: a list or an object for each column, or for each row."""
    values = list(outline.values())
    if values and all(isinstance(value, dict) for value in values):
        return all(map(str.isdigit, outline)) or all(all(map(str.isdigit, value)) for value in values)
    return bool(values) and all(
        isinstance(value, list) and value and not isinstance(value[0], dict) for value in values
    )


def _contents_of(path: Path) -> _Contents:
    status = path.stat()
    return _contents(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _contents(path: Path, size: int, changed: int) -> _Contents:
    """Kept for as long as the file has this size and time of change."""
    with closing(_Stream(path)) as stream:
        return stream.contents()


class _Stream:
    """One JSON text, decoded a value at a time from a moving window."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")
        self.decoder = json.JSONDecoder()
        self.text, self.at, self.line = "", 0, 1
        self.element: int | None = None  # that is being read, if its line does not tell it

    def close(self) -> None:
        self.stream.close()

    def objects(self) -> Iterator[Found]:
        """The elements of an array, or objects one after another."""
        match self._peek():
            case "":
                return
            case "[":
                yield from self._elements()
                self._end()
            case "{":
                while self._peek():
                    line = self.line
                    yield Found(line, _as_object(self._value()))
            case other:
                raise self._broken(f"expected an array of objects, found {other!r}")

    def members(self, chosen: list[str]) -> Iterator[Found]:
        """The elements of the `chosen` lists of an object."""
        for key in self._keys():
            if key in chosen:
                yield from self._elements()
            else:
                self._value()

    def contents(self) -> _Contents:
        lists: dict[str, int] = {}
        outline: dict[str, Any] = {}
        for key in self._keys():
            if self._peek() != "[":
                outline[key] = self._value()
                continue
            count = 0
            first: list[Any] = []
            for found in self._elements():
                first = first or [found.value]
                count += 1
            outline[key] = first
            if not first or isinstance(first[0], dict):
                lists[key] = count
        return _Contents(lists, outline)

    def _keys(self) -> Iterator[str]:
        """The keys of an object; each stands before its value, which the caller takes."""
        self._skip("{")
        while self._peek() != "}":
            key = self._value()
            if not isinstance(key, str) or self._peek() != ":":
                raise self._broken('expected "key": value')
            self._skip(":")
            self._peek()
            yield key
            if self._peek() != "}":
                self._skip(",")
        self._skip("}")
        self._end()

    def _elements(self) -> Iterator[Found]:
        """The elements of an array, up to and with the closing bracket."""
        before = self._skip("[")
        if self._peek() == "]":
            self._skip("]")
            return
        for number in itertools.count():
            self._peek()
            line = self.line
            self.element = element = number if line == before else None
            value = self._value()
            self.element = None
            yield Found(line, _as_object(value), element)
            before = line
            match self._peek():
                case "]":
                    self._skip("]")
                    return
                case "":
                    raise self._broken("the file ends in the middle of the array")
                case ",":
                    self._skip(",")
                case other:
                    raise self._broken(f"expected ',' or ']' after an object, found {other!r}")

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

    def _skip(self, expected: str) -> int:
        """Past the next character; returns its line."""
        if (found := self._peek()) != expected:
            raise self._broken(
                f"expected {expected!r}, found {found!r}" if found else "the file ends too early"
            )
        self.at += 1
        return self.line

    def _end(self) -> None:
        if self._peek():
            raise self._broken("text after the end of the JSON document")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self._broken("nested too deeply") from error
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise self._broken(
                        f"row longer than {MAX_ROW_BYTES >> 20} MiB, or {error.msg}"
                    ) from error
                if not self._more():
                    self.line += self.text.count("\n", self.at, error.pos)
                    raise self._broken(error.msg) from error
                continue
            except ValueError as error:  # Python's limit on the digits of a number
                raise self._broken("a number of thousands of digits") from error
            if end == len(self.text) and self._more():
                continue  # a number may go on in the next chunk
            if self.text.count("[", self.at, end) + self.text.count("{", self.at, end) > DEEPEST:
                try:
                    check_depth(value)
                except ValueError as error:
                    raise self._broken(str(error)) from error
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
        return DataError(f"{place(str(self.path), self.line, self.element)}: broken JSON: {problem}")
