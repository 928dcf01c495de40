"""Tokenized documents on disk: written once, published whole, read through memory maps.

A store is a folder: `tokens.i4`, `weights.f4` (flat), `documents.bin` (one fixed-size record per
document), `ledger.jsonl` (one line per dropped row), `manifest.json`. It is built in a temporary folder
beside its place and renamed there, so a reader sees all of it or nothing, whoever else builds it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.encode import Document, Ids, Weights
from qlora_trainer.data.lines import place
from qlora_trainer.data.rows import Row
from qlora_trainer.system import cache, redact
from qlora_trainer.system.disk import disk_errors

VERSION = 4
MANIFEST = "manifest.json"
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # first token, in tokens
        ("length", "<i4"),  # tokens
        ("answer_start", "<i4"),
        ("answer_stop", "<i4"),
        ("source", "<i4"),
        ("file", "<i4"),
        ("line", "<i8"),
        ("element", "<i4"),  # -1 for none
        ("weight", "<f8"),  # sum of loss weights
    ]
)
ABANDONED = 24 * 3600  # seconds after which an unfinished temporary folder is nobody's


class DroppedRow(NamedTuple):
    """A line of the ledger."""

    where: str  # file:line
    reason: str  # bad_row | empty_answer | too_long | all_masked | duplicate_id
    detail: str


class Prompt(NamedTuple):
    """A held-out question for evaluation by generation."""

    ids: list[int]
    text: str  # the prompt, decoded with its special tokens
    reference: str  # the answer, decoded without them
    where: str  # file:line


@dataclass(frozen=True)
class Ledger:
    """What happened to the rows that were read."""

    read: int
    kept: int  # rows that gave at least one document
    dropped: dict[str, int]  # reason -> rows
    notes: dict[str, int]  # truncated, split, double_bos, … (screen.NOTES) -> rows
    noted: dict[str, list[str]]  # the same -> places of the first of them
    remarks: list[str]  # what was found beside the rows and not read
    path: Path | None = None

    def rows(self) -> Iterator[DroppedRow]:
        """Every dropped row, in order of reading."""
        if self.path is not None:
            with self.path.open(encoding="utf-8") as stream:
                for line in stream:
                    yield DroppedRow(*json.loads(line))


class Writer:
    """Appends documents to a temporary folder and publishes it as `place`.

    Each method raises CheckpointError where the disk refuses what it writes.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        with disk_errors(self.place):
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(place.parent)
            self.folder = Path(tempfile.mkdtemp(prefix=".building-", dir=place.parent))
            self.files = {
                name: (self.folder / name).open("wb") for name in ("tokens.i4", "weights.f4", "documents.bin")
            }
            self.ledger = (self.folder / "ledger.jsonl").open("w", encoding="utf-8")
        self.redactor = redact.Redactor()
        self.hash = hashlib.sha256()
        self.documents = self.tokens = self.largest_id = 0
        self.names: dict[str, int] = {}
        self.dropped: Counter[str] = Counter()

    def add(self, document: Document, source: int, row: Row) -> None:
        record = np.array(
            [
                (
                    self.tokens,
                    len(document.ids),
                    *document.answer,
                    source,
                    self.names.setdefault(row.file, len(self.names)),
                    row.line,
                    -1 if row.element is None else row.element,
                    float(document.weights.sum(dtype=np.float64)),
                )
            ],
            dtype=RECORD,
        )
        with disk_errors(self.place):
            for name, array in (
                ("tokens.i4", document.ids),
                ("weights.f4", document.weights),
                ("documents.bin", record),
            ):
                raw = array.tobytes()
                self.files[name].write(raw)
                if name != "documents.bin":
                    self.hash.update(raw)
        self.hash.update(len(document.ids).to_bytes(8, "little"))
        self.documents += 1
        self.tokens += len(document.ids)
        self.largest_id = max(self.largest_id, int(document.ids.max(initial=0)))

    def drop(self, row: DroppedRow) -> None:
        self.dropped[row.reason] += 1
        with disk_errors(self.place):
            self.ledger.write(json.dumps(self.redactor.tree(row), ensure_ascii=False) + "\n")

    def publish(self, manifest: dict[str, Any]) -> None:
        """Flush to disk, then rename; if somebody else was first, theirs stays and ours goes."""
        manifest = manifest | {
            "version": VERSION,
            "fingerprint": self.hash.hexdigest(),
            "names": list(self.names),
            "dropped": dict(self.dropped),
            "largest_id": self.largest_id,
        }
        template = {"chat_template": manifest.get("chat_template")}  # masked, it would be another one
        with disk_errors(self.place):
            for stream in [*self.files.values(), self.ledger]:
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            cache.seal(self.folder, MANIFEST, redact.tree(manifest) | template)
            with (self.folder / MANIFEST).open("rb") as written:
                os.fsync(written.fileno())
            try:
                self.folder.rename(self.place)
            except OSError:
                if not (self.place / MANIFEST).exists():
                    raise
                shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Close and delete what was written (nothing happens after `publish`)."""
        for stream in [*self.files.values(), self.ledger]:
            with suppress(OSError):  # a full disk does not take what is left to be written either
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(".building-*"):
        try:
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def is_built(folder: Path, say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether `folder` is a store, every byte of it as it was written; `say` is told of one that is not."""
    try:
        return cache.sealed(folder, MANIFEST) is not None
    except cache.DamagedError as error:
        say(f"{error}: the rows are tokenized again")
        return False


class TokenizedData:
    """Documents as flat memory-mapped arrays, each byte checked when they are opened.

    `beside` tells what lies beside the sources and is not read. Raises DamagedError where a file is missing
    or not as it was written.

    Attributes:
        fingerprint: hex sha256 of all ids, weights and borders. Equal fingerprint, equal data.
        lengths: int32 [N], tokens per document.
        weights: float64 [N], sum of loss weights per document.
        repeats: float64 [N], how often a document is seen per epoch (its source's weight).
        ledger: what was read, kept and dropped.
        formats: the format of each source.
        sources: the name of each source.
        largest_id: of all tokens.
        chat_template, template_origin, stop_token_ids: what the conversations were rendered with; they
            are stored with the adapter. `chat_template` is None for raw text.
    """

    def __init__(self, folder: Path, beside: Iterable[str] = ()) -> None:
        self.folder = folder
        manifest = cache.sealed(folder, MANIFEST)
        assert manifest is not None, f"{folder} has not been built"
        self.fingerprint: str = manifest["fingerprint"]
        self.chat_template: str | None = manifest["chat_template"]
        self.template_origin: str | None = manifest["template_origin"]
        self.stop_token_ids: tuple[int, ...] = tuple(manifest["stop_token_ids"])
        self.formats: list[str] = manifest["formats"]
        self.sources: list[str] = manifest["sources"]
        self.max_length: int = manifest["max_length"]
        self.largest_id: int = manifest["largest_id"]
        self._names: list[str] = manifest["names"]
        self._documents: NDArray[Any] = np.memmap(folder / "documents.bin", dtype=RECORD, mode="r")
        self._tokens: Ids = np.memmap(folder / "tokens.i4", dtype="<i4", mode="r")
        self._weights: Weights = np.memmap(folder / "weights.f4", dtype="<f4", mode="r")
        self.lengths: NDArray[np.int32] = np.ascontiguousarray(self._documents["length"])
        self.weights: NDArray[np.float64] = np.ascontiguousarray(self._documents["weight"])
        self.repeats: NDArray[np.float64] = np.asarray(manifest["repeats"])[self._documents["source"]]
        self.ledger = Ledger(
            manifest["read"],
            manifest["kept"],
            manifest["dropped"],
            manifest["notes"],
            manifest["noted"],
            [*beside, *manifest["remarks"]],
            folder / "ledger.jsonl",
        )

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def n_tokens(self) -> int:
        return len(self._tokens)

    @property
    def n_supervised(self) -> int:
        """Tokens with a loss weight above 0."""
        return int(np.count_nonzero(self._weights))

    def document(self, index: int) -> Document:
        """Ids and weights of one document (views of the map, not copies)."""
        record = self._documents[index]
        span = slice(int(record["offset"]), int(record["offset"]) + int(record["length"]))
        return Document(
            self._tokens[span], self._weights[span], (int(record["answer_start"]), int(record["answer_stop"]))
        )

    def ids_from(self, first: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The token ids that are `first` or more, ascending, and how often each of them occurs."""
        ids, counts = np.unique(self._tokens[self._tokens >= first], return_counts=True)
        return ids, counts

    def where(self, index: int) -> str:
        """`file:line` of the row a document came from, with its element where a line has several."""
        record = self._documents[index]
        element = None if record["element"] < 0 else record["element"]
        return place(self._names[record["file"]], record["line"], element)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Iterator[Prompt]:
        """Prompt and reference answer of each document whose last answer is whole, in order.

        The ids of the prompt are those of training: everything before the last assistant turn.
        """
        given = 0
        for index in range(len(self)):
            document = self.document(index)
            start, stop = document.answer
            if start <= 0 or given == limit:
                continue
            given += 1
            ids = document.ids[:start].tolist()
            reference = tokenizer.decode(document.ids[start:stop].tolist(), skip_special_tokens=True)
            yield Prompt(ids, tokenizer.decode(ids), str(reference).strip(), self.where(index))
