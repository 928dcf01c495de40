"""One epoch's order: which documents share a row, and which rows share a micro-batch.

Comes in: lengths, a layout, (seed, epoch). Goes out: an `EpochOrder`, two flat arrays however many documents
there are. It is a pure function of what comes in; ranks and steps are the loader's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.packing import Order, pack

MEGABATCH = 50  # steps' worth of documents that group_by_length sorts at a time, as transformers does


@dataclass(frozen=True)
class EpochOrder(Sequence[list[Order]]):
    """Micro-batches as lists of rows, each row an array of document indices.

    Attributes:
        documents: int64 [D], document indices, row after row.
        starts: int64 [R + 1], where in `documents` each row starts.
        micro_batch_size: rows per micro-batch; the last one may have fewer.
    """

    documents: Order
    starts: Order
    micro_batch_size: int

    @property
    def n_rows(self) -> int:
        return len(self.starts) - 1

    def __len__(self) -> int:
        return -(-self.n_rows // self.micro_batch_size)

    @overload
    def __getitem__(self, index: int) -> list[Order]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Order]]: ...
    def __getitem__(self, index: int | slice) -> list[Order] | list[list[Order]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.micro_batch_size
        borders = self.starts[first : first + self.micro_batch_size + 1].tolist()
        return [self.documents[start:stop] for start, stop in pairwise(borders)]

    def row_tokens(self, lengths: NDArray[np.int32]) -> Order:
        """int64 [R], tokens in each row."""
        return np.add.reduceat(lengths[self.documents].astype(np.int64), self.starts[:-1])

    def widest_rows(self, lengths: NDArray[np.int32]) -> Order:
        """int64 [M], tokens in the longest row of each micro-batch."""
        return np.maximum.reduceat(self.row_tokens(lengths), np.arange(0, self.n_rows, self.micro_batch_size))


def epoch_order(
    lengths: NDArray[np.int32],
    repeats: NDArray[np.float64],
    *,
    micro_batch_size: int,
    micro_batches_per_step: int,
    pack_tokens: int | None,
    group_by_length: bool,
    seed: int,
    epoch: int,
) -> EpochOrder:
    """The order of `epoch`: packs of `pack_tokens`, or single documents, alike in length or not.

    `lengths` is int32 [N], tokens of every document; `repeats` float64 [N], how often each is seen: 2.5 is
    twice, and a third time in every other epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    whole = np.floor(repeats).astype(np.int64)
    extra = rng.random(len(whole)) < repeats - whole
    documents = rng.permutation(np.repeat(np.arange(len(whole)), whole + extra))
    if pack_tokens is not None:
        return EpochOrder(*pack(lengths, documents, pack_tokens, rng), micro_batch_size)
    if group_by_length:
        mega = MEGABATCH * micro_batch_size * micro_batches_per_step
        chunks = [documents[start : start + mega] for start in range(0, len(documents), mega)]
        documents = np.concatenate([c[np.argsort(-lengths[c], kind="stable")] for c in chunks])
        full = len(documents) // micro_batch_size * micro_batch_size  # what is left over stays last
        batches = documents[:full].reshape(-1, micro_batch_size)
        documents = np.concatenate([rng.permutation(batches).reshape(-1), documents[full:]])
    return EpochOrder(documents, np.arange(len(documents) + 1), micro_batch_size)
