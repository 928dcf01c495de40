"""Held-out rows that are training rows: counted before anything is measured on them.

Compared are documents as they are trained on, token by token, so it does not matter where rows came from,
under which ids, or that a template trimmed them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.store import TokenizedData
from qlora_trainer.errors import DataError


def shared_documents(train: TokenizedData, held_out: TokenizedData) -> int:
    """How many held-out documents are training documents too."""
    lengths = np.intersect1d(train.lengths, held_out.lengths)
    known = set(_digests(train, lengths))
    return sum(digest in known for digest in _digests(held_out, lengths)) if known else 0


def _digests(data: TokenizedData, lengths: NDArray[np.int32]) -> Iterator[bytes]:
    for index in np.flatnonzero(np.isin(data.lengths, lengths)):
        yield hashlib.blake2b(data.document(int(index)).ids.tobytes(), digest_size=8).digest()


def told(shared: int, documents: int) -> list[str]:
    """A line about it, if there is something to tell."""
    if not shared:
        return []
    return [f"{shared:,} of {documents:,} held-out documents are training documents too: they measure memory"]


def check(train: TokenizedData, held_out: Sequence[TokenizedData], given: bool) -> list[str]:
    """What there is to tell about all held-out parts.

    Raises DataError if they were `given` as data of their own and all of them are training documents.
    """
    shared = sum(shared_documents(train, part) for part in held_out)
    documents = sum(map(len, held_out))
    if given and shared and shared == documents:
        raise DataError(
            f"data.eval_path: all {documents:,} held-out documents are training documents too: only memory "
            "would be measured; give other rows, or hold some out of data.path by data.eval_fraction=0.1"
        )
    return told(shared, documents)
