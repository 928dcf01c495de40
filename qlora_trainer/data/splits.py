"""Which part of local data `data.split` means: of a folder's files, a JSON document's lists, saved splits.

Names are those in use on the hub: a file `train-00000-of-00002.parquet`, a folder `dev/`, a key `"test"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qlora_trainer.errors import ConfigError, DataError

WORDS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "devset", "eval", "evaluation"),
    "test": ("test", "testing", "testset"),
}
SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")  # what tells the parts of one split from each other
EVERYTHING = "all"


def part_of(words: Sequence[str]) -> str | None:
    """`train`, `validation` or `test`, if a word of the names says so; the first one counts."""
    for word in re.split(r"[^a-z]+", " ".join(words).lower()):
        for part, names in WORDS.items():
            if word in names:
                return part
    return None


def choose(names: Mapping[str, Sequence[str]], wanted: str | None, where: str) -> list[str]:
    """Those of `names` that are the split `wanted`, in order; each stands for the words that say what it is.

    Without any word for a split, all of them are for training. Rows for training may also be those that no
    word puts elsewhere. None stands for held-out rows: validation, or else test.

    Raises DataError if there is no such split, ConfigError for a slice, which only the hub knows.
    """
    refuse_slice(wanted)
    if wanted == EVERYTHING:
        return list(names)
    parts = {name: part_of(words) for name, words in names.items()}
    labelled = {part for part in parts.values() if part is not None}
    if wanted is None:
        wanted = next((part for part in ("validation", "test") if part in labelled), "train")
    if not any(wanted in synonyms for synonyms in WORDS.values()):  # train_sft, say: that one alone
        own = [name for name in names if any(SHARD.sub("", word) == wanted for word in names[name])]
        if own:
            return own
    part = part_of([wanted])
    if part in labelled:
        return [name for name in names if parts[name] == part]
    if part == "train" and None in parts.values():
        return [name for name in names if parts[name] is None]
    there = ", ".join(sorted(labelled) or names)
    raise DataError(
        f"{where}: has no split {wanted}; it has {there}: set data.split to one of them, or to all"
    )


def refuse_slice(split: str | None) -> None:
    """Raises ConfigError for the hub's `train[:10%]` and `train+test`."""
    if split is not None and re.search(r"[\[+]", split):
        raise ConfigError(
            f"data.split={split}: slices and sums are for the hub's data; here use data.max_rows, or a list "
            "of sources as data.path"
        )
