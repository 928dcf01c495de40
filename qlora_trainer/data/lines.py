"""Bytes to lines: what every reader of files stands on.

Comes in: a path, plain or compressed by the ending of its name (.gz .bz2 .xz .zst). Goes out: a stream of
bytes, or decoded lines in constant memory. A file that is plainly not what its name says is refused here,
once, rather than line by line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from qlora_trainer.data.problems import MAX_ROW_BYTES, Problem
from qlora_trainer.errors import DataError

CHUNK = 1 << 20  # bytes read at a time
MOST_SKIPPED = 256 << 20  # bytes of a line that are passed over
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UNPACKED, UNPACKED_A_BYTE = 8 << 20, 300  # bytes; a gigabyte of zeros takes one megabyte as .gz
FOREIGN: dict[bytes, tuple[str, str, str]] = {  # how a file begins -> what it is, what to do, its ending
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "fetch the data with git lfs pull", ""),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8", ""),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8", ""),
    b"PK\x03\x04": ("a zip archive", "unpack it", ""),
    b"PAR1": ("Parquet", "name it .parquet", ".parquet"),
    b"ARROW1": ("Arrow", "name it .arrow", ".arrow"),
    b"\x1f\x8b": ("compressed by gzip", "add .gz to its name", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "add .zst to its name", ".zst"),
    b"\xfd7zXZ\x00": ("compressed by xz", "add .xz to its name", ".xz"),
    b"BZh": ("compressed by bzip2", "add .bz2 to its name", ".bz2"),
}


class Found(NamedTuple):
    """What a reader found: the line it began on, counted from 1, and the columns or why there are none.

    `element` counts those of an array from 0, where several begin on one line.
    """

    line: int
    value: dict[str, Any] | Problem
    element: int | None = None


def place(file: str, line: int, element: int | None = None) -> str:
    """Where a row stands, for people."""
    return f"{file}:{line}" if element is None else f"{file}:{line}[{element}]"


def refuse_foreign(path: Path) -> None:
    """Raises DataError where the first bytes say that the content is not what the name says."""
    with path.open("rb") as stream:
        head = stream.read(32)
    for magic, (what, remedy, ending) in FOREIGN.items():
        if head.startswith(magic) and path.suffix.lower() != ending:
            raise DataError(f"{path}: its content is {what}; {remedy}")


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's content, decompressed by the ending of its name."""
    if path.suffix.lower() not in COMPRESSIONS:
        return io.BufferedReader(io.FileIO(path, "rb"), CHUNK)
    raw: Any
    match path.suffix.lower():
        case ".gz":
            raw = gzip.GzipFile(path, "rb")
        case ".bz2":
            raw = bz2.BZ2File(path, "rb")
        case ".xz":
            raw = lzma.LZMAFile(path, "rb")  # noqa: SIM115 (the caller closes it)
        case _:
            raw = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return io.BufferedReader(_Unpacking(raw, path), CHUNK)


class _Unpacking(io.RawIOBase):
    """What a decompressor gives, up to what text can be compressed to."""

    def __init__(self, raw: Any, path: Path) -> None:
        self.raw, self.path = raw, path
        self.left = UNPACKED + UNPACKED_A_BYTE * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self.raw.readinto(buffer)
        self.left -= got
        if self.left < 0:
            raise DataError(
                f"{self.path}: unpacks to more than {UNPACKED_A_BYTE} times its size: no data is like that; "
                "unpack it yourself if it is meant"
            )
        return int(got)

    def close(self) -> None:
        self.raw.close()
        super().close()


def read_lines(path: Path) -> Iterator[tuple[int, str | Problem]]:
    """Decoded lines without their ends; a line that is not UTF-8, holds NUL or is too long is a Problem."""
    with open_bytes(path) as stream:
        number = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                skipped = len(raw)
                while raw and not raw.endswith(b"\n"):  # skip the rest of it without holding it
                    raw = stream.readline(CHUNK)
                    skipped += len(raw)
                    if skipped > MOST_SKIPPED:
                        raise DataError(
                            f"{path}:{number}: longer than {MOST_SKIPPED >> 20} MiB: no text at all"
                        )
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
