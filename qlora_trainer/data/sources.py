"""Where rows come from: files, folders, the hub and the built-in data, behind one small interface.

Comes in: a `Source` of the options. Goes out: an `OpenSource`, which can say what its content is (a
digest, for the cache's key) and yield its rows, again and again, in a fixed order and constant memory.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_trainer.data.folders import files_in, why
from qlora_trainer.data.options import Source
from qlora_trainer.data.rows import Row, passed_over, read_rows, reader_of, supported
from qlora_trainer.data.splits import refuse_slice
from qlora_trainer.data.tables import row_change
from qlora_trainer.errors import ConfigError, DataError, MissingInputError
from qlora_trainer.system.untrusted import hidden_characters

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
BUILTIN = {"restaurant": ("train", "eval_names", "eval_phrasings")}


class OpenSource(Protocol):
    """Rows of one source, and what identifies them; `beside` tells what lies there and is not read."""

    name: str
    beside: Sequence[str]

    def digest(self) -> str:
        """Hex digest of the content: equal content, equal digest, and never the other way round."""

    def rows(self) -> Iterator[Row]:
        """Every row, in order. Raises DataError where the source cannot be read."""


def open_source(source: Source) -> OpenSource:
    """Find out what `source.path` is.

    Raises:
        MissingInputError: nothing is there, or the hub cannot be reached.
        DataError: it is there and cannot be data, or has no such split.
        ConfigError: a split that only the hub knows.
    """
    if source.path.startswith("builtin:"):
        return _builtin(source)
    path = Path(source.path).expanduser()
    if path.is_dir():
        paths, remarks = files_in(path, source.split)
        refuse_hidden(paths)
        return Files(str(path), paths, source.sample_by, source.split, remarks)
    if path.exists():
        reader_of(path)
        if not path.is_file():
            raise DataError(f"{path}: is no file but a pipe or a device; write its content to a file")
        refuse_hidden([path])
        refuse_slice(source.split)
        return Files(str(path), [path], source.sample_by, source.split)
    if (
        path.is_absolute()
        or source.path.startswith((".", "~"))
        or supported(path)
        or not HUB_NAME.fullmatch(source.path)
    ):
        raise MissingInputError(f"{path}: no such file or folder (from {Path.cwd()}); check data.path")
    return Hub(source)


def refuse_hidden(paths: Sequence[Path]) -> None:
    """Raises DataError for a name that no line of a log could show as it is."""
    for path in paths:
        if hidden := hidden_characters(str(path)):
            raise DataError(f"{path}: its name holds control characters ({hidden}); rename it")


@dataclass
class Files:
    """Local files, read in the order that is given."""

    name: str
    paths: list[Path]
    sample_by: str
    split: str | None = None
    beside: Sequence[str] = ()

    def digest(self) -> str:
        total = hashlib.sha256(self.sample_by.encode())
        for path in self.paths:
            try:
                with path.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        total.update(chunk)
            except OSError as error:
                raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from error
            total.update(path.name.encode() + b"\0")
        return total.hexdigest()

    def rows(self) -> Iterator[Row]:
        for path in self.paths:
            yield from read_rows(path, self.sample_by, self.split)

    def inside(self) -> list[str]:
        """Lists of documents that are not read, a line for each file."""
        passed = ((path, passed_over(path, self.split)) for path in self.paths)
        return [f"{path}: {', '.join(lists)} not read: {why(self.split)}" for path, lists in passed if lists]

    def stamp(self) -> list[tuple[int, int]]:
        """Size and time of change of each file, to notice an edit during a long build."""
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, self.paths)]


def _builtin(source: Source) -> OpenSource:
    name, _, split = source.path.removeprefix("builtin:").partition("/")
    split = split or source.split or "train"
    if name not in BUILTIN or split not in BUILTIN[name]:
        known = " ".join(f"builtin:{n}/{s}" for n, splits in BUILTIN.items() for s in splits)
        raise MissingInputError(
            f"data.path={source.path} (split {split}): no such built-in data; there is {known}"
        )
    return Builtin(f"builtin:{name}/{split}", f"qlora_trainer.data.{name}", split)


@dataclass
class Builtin:
    """Data made by a program of ours: `rows(split)` of a module in this room."""

    name: str
    module: str
    split: str
    beside: Sequence[str] = ()

    def digest(self) -> str:
        """Of the rows themselves: they are few, and a change of the program must show."""
        total = hashlib.sha256()
        for row in self.rows():
            total.update(repr(row.value).encode())
        return total.hexdigest()

    def rows(self) -> Iterator[Row]:
        for number, value in enumerate(importlib.import_module(self.module).rows(self.split), 1):
            yield Row(self.name, number, value)


class Hub:
    """A dataset of the Hugging Face hub, downloaded once, or streamed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.beside: Sequence[str] = ()
        self.name = f"{source.path}:{source.split}"
        self._data: Any = None

    def digest(self) -> str:
        if self.source.streaming:
            return f"{self.name}@{self._commit()}:{self.source.name}"
        return str(self._load()._fingerprint)

    def rows(self) -> Iterator[Row]:
        data = self._load()
        as_json = row_change(data.features.arrow_schema if data.features else None, parsed=True)
        for number, value in enumerate(data, 1):
            yield Row(self.name, number, as_json(value))

    def _load(self) -> Any:
        if self._data is None:
            import datasets

            source = self.source
            if not _hub_answers():
                datasets.config.HF_HUB_OFFLINE = True  # what was downloaded before, and no minute of retries
            with _hub_errors(source):
                self._data = datasets.load_dataset(
                    source.path,
                    source.name,
                    split=source.split,
                    revision=source.revision,
                    streaming=source.streaming,
                )
            if isinstance(self._data, dict):
                raise ConfigError(f"data.split is not set; {source.path} has {' '.join(self._data)}")
        return self._data

    def _commit(self) -> str:
        from huggingface_hub import HfApi

        with _hub_errors(self.source):
            return str(HfApi().dataset_info(self.source.path, revision=self.source.revision, timeout=10).sha)


def _hub_answers() -> bool:
    import httpx
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError:
        return False
    return True


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """The hub's many errors as one line of ours."""
    from datasets.exceptions import DatasetNotFoundError
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    missing = f"{source.path}: no such file here, and no dataset of that name on the hub that you may read"
    try:
        yield
    except DatasetNotFoundError as error:  # which does not say why; the hub does
        with _hub_errors(source):
            HfApi().auth_check(source.path, repo_type="dataset")
            HfApi().dataset_info(source.path, revision=source.revision, timeout=10)
        raise MissingInputError(missing) from error
    except GatedRepoError as error:
        raise MissingInputError(
            f"{source.path} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingInputError(
            f"{source.path} has no revision {source.revision}: check data.revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingInputError(f"{missing} (if it is private, set HF_TOKEN)") from error
    except (OSError, HTTPError) as error:
        raise MissingInputError(
            f"{source.path}: no such file here, and the hub cannot be reached; give a path as data.path"
        ) from error
    except (ValueError, RuntimeError) as error:  # unknown split or name; a dataset that is a script
        raise ConfigError(f"{source.path}: {str(error).splitlines()[0]}") from error
