"""Sources to tokenized documents: the one function that commands call, and the cache behind it.

First every row is read and checked (`scan.py`), which is quick, so that all bad rows are reported before
anything is tokenized. Then rows are read again and tokenized in batches, by several processes if there are
many. The result is kept under a key made of everything it depends on: the content of the files, the
tokenizer, the template, the settings and the versions of the libraries that render and tokenize.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.encode import Dropped, Encoder, Masking
from qlora_trainer.data.example import Example
from qlora_trainer.data.options import DataOptions
from qlora_trainer.data.parallel import Result, encode_all, processes
from qlora_trainer.data.problems import Problem, RowError
from qlora_trainer.data.rows import Row
from qlora_trainer.data.scan import VERSION as SCAN_VERSION
from qlora_trainer.data.scan import RowSplit, Scan, SourceReader, contents, digest, ready, scan
from qlora_trainer.data.sources import Files, OpenSource, open_source
from qlora_trainer.data.store import VERSION, DroppedRow, TokenizedData, Writer, is_built
from qlora_trainer.data.templates import resolve_template, template_source
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.system import disk
from qlora_trainer.system.redact import require_whole
from qlora_trainer.system.terminal import to_stderr

BATCH = 512  # rows tokenized at a time
NAMED = 5  # rows that a note is shown with
MANY_ROWS = 4096  # from so many on, starting processes is worth it


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
        CheckpointError: the cache cannot be written.
    """
    key = "data.eval_path" if role == "eval" and options.eval_path else "data.path"
    for source in options.sources(role):
        require_whole(source.path, key)
    opened = [open_source(source) for source in options.sources(role)]
    stamps = _stamps(opened)
    settings = options.key() | {
        "role": role,
        "max_length": max_length,
        "seed": seed if options.eval_fraction else None,
        "template": template_source(options.template, tokenizer),
        "format_version": (VERSION, SCAN_VERSION),
        "libraries": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
    key = digest(
        json.dumps(settings, sort_keys=True, default=str), tokenizer_fingerprint(tokenizer), *contents(opened)
    )
    folder = ready(options.cache_folder(cache_dir)) / key
    if not is_built(folder):
        with FileLock(folder.parent / f".{key}.lock"):
            if not is_built(folder, to_stderr):
                disk.remove(folder)
                found = scan(options, opened, role=role, seed=seed, cache_dir=cache_dir)
                _build(
                    folder,
                    options,
                    opened,
                    tokenizer,
                    found,
                    RowSplit.of(options, role, seed),
                    max_length,
                    stamps,
                )
    return TokenizedData(folder, [line for source in opened for line in source.beside])


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
    return digest(backend.to_str(), json.dumps(rest, sort_keys=True))


def _stamps(opened: list[OpenSource]) -> list[list[tuple[int, int]]]:
    return [source.stamp() for source in opened if isinstance(source, Files)]


def _build(
    folder: Path,
    options: DataOptions,
    opened: list[OpenSource],
    tokenizer: PreTrainedTokenizerBase,
    found: Scan,
    split: RowSplit,
    max_length: int,
    stamps: list[list[tuple[int, int]]],
) -> None:
    """Tokenize everything into a store at `folder`, or leave nothing."""
    sources = options.sources(split.role)
    names = ", ".join(source.name for source in opened)
    template = None
    if found.conversations:
        template = resolve_template(options.template, tokenizer, found.formats)
    elif options.template is not None:
        raise ConfigError(
            f"data.template={options.template}: {names} holds no conversations, so leave it "
            "out, or make questions and answers of it: data.columns={instruction: prompt, output: completion}"
        )
    encoder = Encoder(
        tokenizer,
        template,
        max_length=max_length,
        overlong=options.overlong,
        masking=Masking(options.train_on_inputs, options.train_on_last_turn_only),
        on_lost=options.on_lost_content,
    )
    readers = [SourceReader(source, place, split) for source, place in zip(sources, opened, strict=True)]
    writer = Writer(folder)
    try:
        workers = processes() if found.read >= MANY_ROWS else 1
        kept = 0
        noted: dict[str, list[str]] = {}  # note -> rows
        with closing(encode_all(encoder, _batches(readers, found), workers)) as encoded:
            for entries, results, notes in encoded:
                kept += _write(writer, entries, results, skip=options.on_bad_row == "skip")
                given = [row.where for _, row, content in entries if isinstance(content, Example)]
                for note, places in notes.items():
                    rows = [" ".join(filter(None, (given[at], place))) for at, place in places.items()]
                    noted.setdefault(note, []).extend(rows)
        if not writer.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in writer.dropped.items())
            raise DataError(
                f"{names}: none of {found.read} rows can be trained on ({reasons}); "
                "look at the rows, and at train.max_length and data.overlong"
            )
        if stamps != _stamps(opened):
            raise DataError(f"{names}: changed while it was read; start again when it is complete")
        writer.publish(
            {
                "formats": found.formats,
                "sources": [source.name for source in opened],
                "repeats": [source.weight for source in sources],
                "max_length": max_length,
                "read": found.read,
                "kept": kept,
                "notes": {note: len(rows) for note, rows in noted.items()},
                "noted": {note: rows[:NAMED] for note, rows in noted.items()},
                "remarks": found.remarks,
                "chat_template": template.source if template else None,
                "template_origin": template.origin if template else None,
                "stop_token_ids": template.stop_token_ids if template else [tokenizer.eos_token_id],
            }
        )
    except BaseException:
        writer.discard()
        raise


Entry = tuple[int, Row, Example | DroppedRow]  # source, row, and what to encode or why not


def _batches(readers: list[SourceReader], found: Scan) -> Iterator[tuple[list[Entry], list[Example]]]:
    """Up to BATCH rows at a time, with the examples among them that are to be encoded."""
    entries = (
        (index, row, _admitted(row, example, (index, ordinal) in found.duplicates))
        for index, reader in enumerate(readers)
        for ordinal, (row, example) in enumerate(reader)
    )
    while batch := list(islice(entries, BATCH)):
        yield batch, [content for _, _, content in batch if isinstance(content, Example)]


def _admitted(row: Row, example: Example | Problem, duplicate: bool) -> Example | DroppedRow:
    if isinstance(example, Problem):
        return DroppedRow(row.where, "bad_row", ": ".join(filter(None, example)))
    return DroppedRow(row.where, "duplicate_id", "an earlier row has the same id") if duplicate else example


def _write(writer: Writer, entries: list[Entry], results: Iterable[Result], skip: bool) -> int:
    """Add documents and ledger lines in the order of the rows; returns how many rows gave documents."""
    encoded = iter(results)
    kept = 0
    for index, row, content in entries:
        outcome = next(encoded) if isinstance(content, Example) else content
        if isinstance(outcome, RowError):
            if not skip:
                raise DataError(f"{row.where}: {outcome}; or set data.on_bad_row=skip")
            outcome = DroppedRow(row.where, "bad_row", str(outcome))
        elif isinstance(outcome, Dropped):
            outcome = DroppedRow(row.where, outcome.reason, outcome.detail)
        if isinstance(outcome, DroppedRow):
            writer.drop(outcome)
            continue
        kept += 1
        for document in outcome:
            writer.add(document, index, row)
    return kept
