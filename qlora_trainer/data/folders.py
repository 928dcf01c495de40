"""Which files of a folder are the data that are meant, and which are passed over.

Three kinds of folders: what `datasets` wrote by `save_to_disk` (its own list of files), a set of splits
(`train.jsonl`, `dev/…`; `data.split` chooses), and plain files, all of which are read. Papers that lie beside
data (README.md, a licence) are no rows. What is passed over is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.data.rows import READERS, is_text, stem, supported
from qlora_trainer.data.splits import choose
from qlora_trainer.errors import DataError
from qlora_trainer.system.untrusted import parse_json

PAPERS = ("readme", "license", "licence", "changelog", "contributing", "citation", "notice", "authors")
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"  # of `save_to_disk`: of several splits, of one
ABOUT = (SPLITS_FILE, STATE_FILE, "dataset_info.json", "dataset_infos.json")
SHOWN = 5  # files named in a remark


def files_in(folder: Path, split: str | None) -> tuple[list[Path], list[str]]:
    """The files to read, in the order of their names, and what there is to say about the others.

    Raises DataError where there is nothing to read, or no such split.
    """
    if supported(folder):
        raise DataError(f"{folder}: is a directory, but its name is that of a file; check data.path")
    if (folder / SPLITS_FILE).is_file():
        names = [str(name) for name in _read(folder / SPLITS_FILE, "splits")]
        chosen = choose({name: [name] for name in names}, split, str(folder))
        files = [file for name in chosen for file in _saved(folder / name)]
        return files, _passed_over(folder, [name for name in names if name not in chosen], split)
    if (folder / STATE_FILE).is_file():
        return _saved(folder), []
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data(path, folder)]
    data = _without_papers(found)
    if not data:
        only = f" but {_listed([path.name for path in found])}" if found else ""
        raise DataError(f"{folder}: a folder without {' '.join(READERS)} files{only}; check data.path")
    relative = {str(path.relative_to(folder)): path for path in data}
    words = {name: [*path.relative_to(folder).parts[:-1], stem(path)] for name, path in relative.items()}
    chosen = choose(words, split, str(folder))
    papers = [name for name in (str(path.relative_to(folder)) for path in found) if name not in relative]
    remarks = _passed_over(folder, [name for name in relative if name not in chosen], split)
    for where, kinds in _kinds(relative[name] for name in chosen).items():
        if len(kinds) > 1:
            remarks.append(
                f"{where}: is there as {' and '.join(kinds)}, and all are read: the same rows twice?"
            )
    if papers:
        remarks.append(
            f"{folder}: {_listed(papers)} not read: text beside data; to read it, name it as data.path"
        )
    return [relative[name] for name in chosen], remarks


def _is_data(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith(".") for part in parts)
    cached = path.suffix == ".arrow" and path.name.startswith("cache-")  # what `map` left beside saved data
    return supported(path) and not hidden and not cached and path.name not in ABOUT


def _without_papers(files: Sequence[Path]) -> list[Path]:
    """Without text beside tables, and without papers beside other text."""
    tables = [path for path in files if not is_text(path)]
    return tables or [path for path in files if stem(path).lower() not in PAPERS]


def _kinds(files: Iterable[Path]) -> dict[str, list[str]]:
    """The endings of files by the rest of their names."""
    found: dict[str, list[str]] = {}
    for path in files:
        found.setdefault(str(path.parent / stem(path)), []).append(path.name[len(stem(path)) :])
    return found


def _saved(folder: Path) -> list[Path]:
    """The files of one saved split, in the order that its state tells."""
    entries = _read(folder / STATE_FILE, "_data_files")
    files = [
        folder / str(entry["filename"])
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry
    ]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"{missing[0]}: is missing, and {folder / STATE_FILE} names it; copy the folder again"
        )
    return files


def _read(file: Path, key: str) -> list[Any]:
    try:
        found = parse_json(file.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: is not what save_to_disk writes ({error!r}); save the data again"
        ) from error
    return found if isinstance(found, list) else []


def _passed_over(folder: Path, names: Sequence[str], split: str | None) -> list[str]:
    return [f"{folder}: {_listed(names)} not read: {why(split)}"] if names else []


def why(split: str | None) -> str:
    """What chose, in words."""
    return f"data.split={split}" if split else "held-out rows are those for validation, or else test"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
