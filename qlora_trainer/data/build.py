"""Sources to tokenized documents: the one function that commands call, and the cache behind it.

First every row is read and checked, which is quick, so that all bad rows are reported before anything is
tokenized. Then rows are read again and tokenized in batches. The result is kept under a key made of
everything it depends on: the content of the files, the tokenizer, the template, the settings and the
versions of the libraries that render and tokenize.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data import formats
from qlora_trainer.data.chat import resolve_template, template_source
from qlora_trainer.data.encode import Dropped, Encoder, Masking
from qlora_trainer.data.formats import Example, RowError
from qlora_trainer.data.options import DataOptions, Source
from qlora_trainer.data.rows import Problem, Row
from qlora_trainer.data.sources import Files, OpenSource, open_source
from qlora_trainer.data.store import VERSION, DroppedRow, TokenizedData, Writer
from qlora_trainer.errors import DataError

BATCH = 512  # examples tokenized at a time
SHOWN = 5  # bad rows named in an error


def load_tokenized(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int = 0,
    role: str = "train",
    cache_dir: str | Path | None = None,
) -> TokenizedData:
    """The tokenized documents of `role` (`train` or `eval`), from the cache or built now.

    `seed` chooses the held-out rows when `options.eval_fraction` is set. Any number of processes may call
    this at once for the same data: one builds, the others wait and read.

    Raises:
        DataError: bad rows, empty data, everything masked.
        MissingInputError: a file or hub dataset that is not there.
        ConfigError: a wrong template or a tokenizer without offsets.
    """
    sources = options.sources(role)
    opened = [open_source(source) for source in sources]
    stamps = [source.stamp() for source in opened if isinstance(source, Files)]
    key = _key(options, opened, tokenizer, max_length=max_length, seed=seed, role=role)
    folder = Path(cache_dir or options.cache_dir or default_cache()) / key
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{key}.lock"):
            if not (folder / "manifest.json").exists():
                build = _Build(options, sources, opened, tokenizer, max_length, seed, role)
                build.run(folder, stamps)
    return TokenizedData(folder)


def default_cache() -> Path:
    """`~/.cache/qlora_trainer/tokenized`, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_trainer" / "tokenized"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides how this tokenizer turns text into ids: vocabulary, merges, normalizer,
    added and special tokens, and its chat template."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # a leftover of the last call, not a property of the tokenizer
    backend.no_truncation()
    rest = {
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {token: repr(value) for token, value in tokenizer.added_tokens_decoder.items()},
    }
    return _digest(backend.to_str(), json.dumps(rest, sort_keys=True))


def _digest(*parts: str) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\0")
    return total.hexdigest()


def _key(
    options: DataOptions,
    opened: list[OpenSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    role: str,
) -> str:
    settings = options.key() | {
        "role": role,
        "max_length": max_length,
        "seed": seed if options.eval_fraction else None,
        "template": template_source(options.template, tokenizer),
        "format_version": VERSION,
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
    contents = [f"{source.name}={source.digest()}" for source in opened]
    return _digest(
        json.dumps(settings, sort_keys=True, default=str), tokenizer_fingerprint(tokenizer), *contents
    )[:40]


class _Build:
    """One building of the cache: scan, then tokenize."""

    def __init__(
        self,
        options: DataOptions,
        sources: tuple[Source, ...],
        opened: list[OpenSource],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        role: str,
    ) -> None:
        self.options, self.sources, self.opened = options, sources, opened
        self.tokenizer, self.max_length = tokenizer, max_length
        self.split = RowSplit(0.0 if options.eval_path else options.eval_fraction, seed, role)
        self.skip = options.on_bad_row == "skip"
        self.names = ", ".join(source.name for source in opened)

    def run(self, folder: Path, stamps: list[Any]) -> None:
        scan = self._scan()
        template = None
        if scan.conversations:
            template = resolve_template(self.options.template, self.tokenizer, scan.formats)
        encoder = Encoder(
            self.tokenizer,
            template,
            max_length=self.max_length,
            overlong=self.options.overlong,
            masking=Masking(self.options.train_on_inputs, self.options.train_on_last_turn_only),
        )
        writer = Writer(folder)
        try:
            kept = self._tokenize(encoder, writer, scan)
            if not writer.documents:
                reasons = ", ".join(f"{count} {reason}" for reason, count in writer.dropped.items())
                raise DataError(
                    f"{self.names}: none of {scan.read} rows can be trained on ({reasons}); "
                    "look at the rows with `inspect`, and at train.max_length and data.overlong"
                )
            if stamps != [source.stamp() for source in self.opened if isinstance(source, Files)]:
                raise DataError(f"{self.names}: changed while it was read; start again when it is complete")
            writer.publish(
                {
                    "formats": scan.formats,
                    "sources": [source.name for source in self.opened],
                    "repeats": [source.weight for source in self.sources],
                    "max_length": self.max_length,
                    "read": scan.read,
                    "kept": kept,
                    "notes": dict(encoder.notes),
                    "chat_template": template.source if template else None,
                    "template_origin": template.origin if template else None,
                    "stop_token_ids": template.stop_token_ids if template else [self.tokenizer.eos_token_id],
                }
            )
        except BaseException:
            writer.discard()
            raise

    def _scan(self) -> _Scan:
        """Read and check every row. Raises DataError naming the first bad ones, unless they are skipped."""
        scan = _Scan()
        for index in range(len(self.sources)):
            reader = SourceReader(self.sources[index], self.opened[index], self.split)
            ids = _Ids()
            for ordinal, (row, example) in enumerate(reader):
                scan.read += 1
                if isinstance(example, Problem):
                    scan.report(row.where, example)
                    continue
                scan.conversations |= not example.raw
                assert isinstance(row.value, dict)
                ids.add(row.value.get("id"), ordinal, row.line)
            for ordinal, line, first in ids.repeated():
                scan.report(
                    f"{self.opened[index].name}:{line}", Problem("id", f"the same as in line {first}")
                )
                scan.duplicates.add((index, ordinal))
            scan.formats.append(reader.format)
        if not scan.read:
            held = " held out" if self.split.fraction else ""
            raise DataError(
                f"{self.names}: empty: no rows{held}; check data.path, data.split and data.eval_fraction"
            )
        if scan.bad and not self.skip:
            raise DataError(
                f"{scan.bad} of {scan.read} rows are bad; mend or leave them out with data.on_bad_row=skip:"
                + "".join(f"\n  {line}" for line in scan.first)
            )
        return scan

    def _tokenize(self, encoder: Encoder, writer: Writer, scan: _Scan) -> int:
        """Encode every good row into `writer`; returns how many rows gave documents."""
        kept = 0
        for index in range(len(self.sources)):
            reader = SourceReader(self.sources[index], self.opened[index], self.split)
            numbered = enumerate(reader)
            while batch := list(islice(numbered, BATCH)):
                good: list[tuple[Row, Example]] = []
                for ordinal, (row, example) in batch:
                    if isinstance(example, Problem):
                        writer.drop(
                            DroppedRow(row.where, "bad_row", f"{example.field}: {example.text}".lstrip(": "))
                        )
                    elif (index, ordinal) in scan.duplicates:
                        writer.drop(DroppedRow(row.where, "duplicate_id", "an earlier row has the same id"))
                    else:
                        good.append((row, example))
                results = encoder([example for _, example in good])
                for (row, _), result in zip(good, results, strict=True):
                    if isinstance(result, RowError):
                        if not self.skip:
                            raise DataError(f"{row.where}: {result}; or set data.on_bad_row=skip")
                        writer.drop(DroppedRow(row.where, "bad_row", str(result)))
                    elif isinstance(result, Dropped):
                        writer.drop(DroppedRow(row.where, result.reason, result.detail))
                    else:
                        kept += 1
                        for document in result:
                            writer.add(document, index, row.file, row.line)
        return kept


@dataclass
class _Scan:
    """What the first reading found."""

    read: int = 0
    bad: int = 0
    conversations: bool = False
    formats: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    duplicates: set[tuple[int, int]] = field(default_factory=set)  # (source, ordinal of the row)

    def report(self, where: str, problem: Problem) -> None:
        self.bad += 1
        if len(self.first) < SHOWN:
            self.first.append(": ".join(part for part in (where, problem.field, problem.text) if part))


class _Ids:
    """Rows' own ids, 24 bytes each, to find repeated ones."""

    def __init__(self) -> None:
        self.hashes, self.ordinals, self.lines = array("q"), array("q"), array("q")

    def add(self, value: Any, ordinal: int, line: int) -> None:
        if isinstance(value, str | int) and not isinstance(value, bool):
            self.hashes.append(hash((value,)))
            self.ordinals.append(ordinal)
            self.lines.append(line)

    def repeated(self) -> Iterator[tuple[int, int, int]]:
        """(ordinal, line, line of the first) of each row whose id came before."""
        hashes = np.frombuffer(self.hashes, dtype=np.int64) if self.hashes else np.empty(0, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        for place in np.sort(order[same]):
            first = order[np.searchsorted(hashes[order], hashes[place])]
            yield self.ordinals[place], self.lines[place], self.lines[first]


@dataclass(frozen=True)
class RowSplit:
    """Which rows are held out: a hash of the row's content, so equal rows are never on both sides."""

    fraction: float
    seed: int
    role: str

    def takes(self, row: dict[str, Any]) -> bool:
        if not self.fraction:
            return True
        text = f"{self.seed} {json.dumps(row, sort_keys=True, default=str)}"
        place = (
            int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")
            / 2**64
        )
        return (place < self.fraction) == (self.role == "eval")


class SourceReader:
    """Rows of one source as checked examples, with the format found on the way.

    Yields (row, Example) or (row, Problem); stops after `source.max_rows` examples.
    """

    def __init__(self, source: Source, opened: OpenSource, split: RowSplit) -> None:
        self.source, self.opened, self.split = source, opened, split
        self.format = source.format

    def __iter__(self) -> Iterator[tuple[Row, Example | Problem]]:
        read: formats.Reader | None = None
        taken = 0
        for row in self.opened.rows():
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
                return

    def _reader(self, row: Row, value: dict[str, Any]) -> formats.Reader:
        columns = dict(self.source.columns)
        renamed = formats.rename(value, columns) if columns else value
        formats.refuse_preference(renamed, row.where)
        if self.format == "auto":
            self.format = formats.detect(renamed, row.where)
        return formats.reader(self.format, columns)
