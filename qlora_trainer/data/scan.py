"""Sources to checked examples: every row read once, quickly, before anything is tokenized.

Comes in: the options. Goes out: examples with their rows (`SourceReader`), and a `Scan`, which says that all
rows are good, or has named the first bad ones. Neither torch nor transformers is imported, so that a command
can call `check_rows` first of all. A scan without errors is kept under the content of the files and the
settings that it depends on, and not made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.data import formats
from qlora_trainer.data.example import Example
from qlora_trainer.data.lines import place
from qlora_trainer.data.options import DataOptions, Source
from qlora_trainer.data.problems import Problem, RowError
from qlora_trainer.data.rows import Row
from qlora_trainer.data.sources import Files, Hub, OpenSource, open_source
from qlora_trainer.data.trees import join_trees
from qlora_trainer.errors import CheckpointError, DataError
from qlora_trainer.system import cache, redact
from qlora_trainer.system.disk import atomic_write
from qlora_trainer.system.terminal import to_stderr

VERSION = 5  # of how rows are read and checked
SHOWN = 5  # bad rows named in an error


@dataclass
class Scan:
    """What reading every row found.

    Attributes:
        read: rows of this role.
        conversations: whether any of them needs a chat template.
        formats: of each source.
        duplicates: (source, ordinal of the row) of rows that repeat an id.
        remarks: what was found and not read, a line for each.
        bad: how many rows are bad; `first` describes the first ones as `file:line: field: problem`.
    """

    read: int = 0
    conversations: bool = False
    formats: list[str] = field(default_factory=list)
    duplicates: set[tuple[int, int]] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)
    bad: int = 0
    first: list[str] = field(default_factory=list)

    def report(self, where: str, problem: Problem) -> None:
        self.bad += 1
        if len(self.first) < SHOWN:
            self.first.append(": ".join(part for part in (where, problem.field, problem.text) if part))


def check_rows(options: DataOptions, seed: int) -> None:
    """Scan the local rows of every role, so that bad ones end a command in seconds.

    Hub datasets are left to `load_tokenized`, which downloads them. Raises DataError, MissingInputError.
    """
    for role in ("train", "eval") if options.has_eval else ("train",):
        opened = [open_source(source) for source in options.sources(role)]
        if not any(isinstance(source, Hub) for source in opened):
            scan(options, opened, role=role, seed=seed)


def scan(
    options: DataOptions,
    opened: list[OpenSource],
    *,
    role: str,
    seed: int,
    cache_dir: str | Path | None = None,
) -> Scan:
    """Read and check every row of `opened`, the sources of `role`, or recall that it was done.

    Raises DataError naming the first bad rows (unless `data.on_bad_row=skip`), or that there are none.
    """
    relevant = ("on_bad_row", "eval_fraction")
    settings = {name: getattr(options, name) for name in relevant} | {
        "version": VERSION,
        "sources": [asdict(source) for source in options.sources(role)],
        "role": role,
        "seed": seed,
    }
    key = digest(json.dumps(settings, sort_keys=True), *contents(opened))
    kept = ready(options.cache_folder(cache_dir) / "scans") / f"{key}.json"
    try:
        if values := cache.kept_record(kept):
            return Scan(**values | {"duplicates": {tuple(pair) for pair in values["duplicates"]}})
    except cache.DamagedError as error:
        to_stderr(f"{error}: the rows are checked again")
    found = _read_all(options, opened, role, seed)
    record = redact.tree(asdict(found) | {"duplicates": sorted(found.duplicates)})
    atomic_write(kept, cache.with_digest(record), durable=False)
    return found


def _read_all(options: DataOptions, opened: list[OpenSource], role: str, seed: int) -> Scan:
    found = Scan()
    names = ", ".join(source.name for source in opened)
    split = RowSplit.of(options, role, seed)
    for index, source in enumerate(options.sources(role)):
        reader = SourceReader(source, opened[index], split)
        ids = _Ids()
        for ordinal, (row, example) in enumerate(reader):
            found.read += 1
            if isinstance(example, Problem):
                found.report(row.where, example)
                continue
            found.conversations |= not example.raw
            assert isinstance(row.value, dict)
            ids.add(row, ordinal)
        for ordinal, where, first in ids.repeated():
            found.report(where, Problem("id", f"the same as in {first}"))
            found.duplicates.add((index, ordinal))
        found.formats.append(reader.format)
        found.remarks += reader.remarks()
    if not found.read:
        held = " held out" if split.fraction else ""
        raise DataError(f"{names}: empty: no rows{held}; check data.path, data.split and data.eval_fraction")
    if found.bad and options.on_bad_row == "error":
        raise DataError(
            f"{found.bad} of {found.read} rows are bad; mend or leave them out with data.on_bad_row=skip:"
            + "".join(f"\n  {line}" for line in found.first)
        )
    return found


def contents(opened: list[OpenSource]) -> list[str]:
    """What identifies the rows, whenever and wherever they are read."""
    return [f"{source.name}={source.digest()}" for source in opened]


def digest(*parts: str) -> str:
    """40 hex digits of all parts in order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\0")
    return total.hexdigest()[:40]


def ready(folder: Path) -> Path:
    """The folder, made if it was not there. Raises CheckpointError (disk) if nothing can be kept in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: tokenized data cannot be kept there ({error.strerror}); set data.cache_dir"
        ) from error
    return folder


class _Ids:
    """Rows' own ids, 40 bytes each, to find repeated ones.

    A number may only number the rows of its shard, so it repeats another row's id only if the rows are equal.
    """

    def __init__(self) -> None:
        self.hashes, self.ordinals, self.lines = array("q"), array("q"), array("q")
        self.files, self.elements = array("q"), array("q")
        self.names: dict[str, int] = {}

    def add(self, row: Row, ordinal: int) -> None:
        assert isinstance(row.value, dict)
        value = row.value.get("id")
        if not isinstance(value, str | int) or isinstance(value, bool):
            return
        numbered = isinstance(value, int) or re.fullmatch(r"\s*-?\d+\s*", value)
        self.hashes.append(_hash(row.value if numbered else [value]))
        self.ordinals.append(ordinal)
        self.lines.append(row.line)
        self.elements.append(-1 if row.element is None else row.element)
        self.files.append(self.names.setdefault(row.file, len(self.names)))

    def repeated(self) -> Iterator[tuple[int, str, str]]:
        """(ordinal, its place, the place of the first) of each row whose id came before."""
        hashes = np.frombuffer(self.hashes, dtype=np.int64) if self.hashes else np.empty(0, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        for at in np.sort(order[same]):
            first = order[np.searchsorted(hashes[order], hashes[at])]
            yield self.ordinals[at], self._place(at), self._place(first)

    def _place(self, at: int) -> str:
        element = self.elements[at]
        name = list(self.names)[self.files[at]]
        return place(name, self.lines[at], None if element < 0 else element)


def _hash(value: Any) -> int:
    """8 bytes of a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, default=str).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class RowSplit:
    """Which rows are held out: a hash of the row's content, so equal rows are never on both sides."""

    fraction: float
    seed: int
    role: str

    @classmethod
    def of(cls, options: DataOptions, role: str, seed: int) -> RowSplit:
        return cls(0.0 if options.eval_path else options.eval_fraction, seed, role)

    def takes(self, row: dict[str, Any]) -> bool:
        if not self.fraction:
            return True
        text = f"{self.seed} {json.dumps(row, sort_keys=True, default=str)}"
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") / 2**64 < self.fraction) == (self.role == "eval")


class SourceReader:
    """Rows of one source as checked examples, with the format found on the way.

    Yields (row, Example) or (row, Problem); stops after `source.max_rows` examples.
    """

    def __init__(self, source: Source, opened: OpenSource, split: RowSplit) -> None:
        self.source, self.opened, self.split = source, opened, split
        self.format = source.format
        self.files: set[str] | None = set()  # that had rows; None if reading stopped before the last one

    def __iter__(self) -> Iterator[tuple[Row, Example | Problem]]:
        read: formats.Reader | None = None
        taken = 0
        rows = self.opened.rows()
        for row in join_trees(rows) if self.source.format in ("auto", "oasst") else rows:
            if self.files is not None:
                self.files.add(row.file)
            if isinstance(row.value, Problem):
                yield row, row.value
                continue
            if not self.split.takes(row.value):
                continue
            try:
                read = read or self._reader(row, row.value)
                example = read(row.value)
            except RowError as error:
                yield row, error.problem
                continue
            yield row, example
            taken += 1
            if taken == self.source.max_rows:
                self.files = None
                return

    def remarks(self) -> list[str]:
        """What reading all rows has shown: lists that are not read, files without rows."""
        if not isinstance(self.opened, Files):
            return []
        empty = [path for path in self.opened.paths if self.files is not None and str(path) not in self.files]
        return self.opened.inside() + [f"{path}: empty: no rows" for path in empty]

    def _reader(self, row: Row, value: dict[str, Any]) -> formats.Reader:
        columns = dict(self.source.columns)
        named = formats.named(value, columns)
        formats.refuse_preference(named, row.where)
        if self.format == "auto":
            self.format = formats.detect(named, row.where)
        return formats.reader(self.format, columns)
