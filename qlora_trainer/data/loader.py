"""Documents to batches: which documents a step holds, as a pure function of (seed, epoch, index).

Comes in: TokenizedData and the sizes of a step. Goes out: StepBatches, by their number. There is no
position to save: to resume is to ask for another index. One epoch is one order of the data (`order.py`):
rows, which are packs or single documents; micro-batches of rows; steps of `accumulation * world_size`
micro-batches. Rank r takes micro-batches r, r + world_size, … of a step, so any world size with the same
product sees the same micro-batches.

What is prepared ahead is prepared by threads. A step's batches take less than a millisecond to make; to
fetch them from a worker process took 5 to 15, and a process can be killed on its own, and needs /dev/shm.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.data.order import EpochOrder, epoch_order
from qlora_trainer.data.packing import Order
from qlora_trainer.data.store import TokenizedData
from qlora_trainer.errors import ConfigError

AHEAD = 2  # steps that each thread keeps ready


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step.

    Attributes:
        micro_batches: as many on every rank. Where the last step of an epoch does not divide, some ranks get
            a copy of another micro-batch with all labels ignored and `rows=()`: it adds exactly 0.
        total_weight: sum of loss weights over all micro-batches of all ranks; divide the loss by it.
    """

    micro_batches: list[Batch]
    total_weight: float


class Loader:
    """Batches of `data` for one rank.

    Args:
        micro_batch_size: documents per micro-batch; packs per micro-batch when packing.
        accumulation: micro-batches per rank and step.
        max_length: tokens; with packing every row has exactly so many, else the longest document's.
        group_by_length: documents of like length share a micro-batch (not with packing).
        num_workers: threads that prepare batches ahead in `steps`; the batches are the same.
        pad_id: token written into padding; its value never matters to a result.
    """

    def __init__(
        self,
        data: TokenizedData,
        *,
        micro_batch_size: int,
        accumulation: int,
        max_length: int,
        packing: bool,
        group_by_length: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pad_id: int,
    ) -> None:
        if packing and group_by_length:
            raise ConfigError(
                "train.packing and train.group_by_length are both set; packs are full: drop group_by_length"
            )
        if int(data.lengths.max()) > max_length:
            raise ConfigError(
                f"train.max_length={max_length}: the data were tokenized with {data.max_length}"
            )
        assert 0 <= rank < world_size and micro_batch_size > 0 and accumulation > 0
        self.data = data
        self.micro_batch_size, self.accumulation, self.max_length = micro_batch_size, accumulation, max_length
        self.packing, self.group_by_length, self.seed = packing, group_by_length, seed
        self.rank, self.world_size, self.num_workers, self.pad_id = rank, world_size, num_workers, pad_id
        order = {
            "data": data.fingerprint,
            "repeats": hashlib.sha256(data.repeats.tobytes()).hexdigest(),
            "micro_batch_size": micro_batch_size,
            "micro_batches": accumulation * world_size,
            "max_length": max_length,
            "packing": packing,
            "group_by_length": group_by_length,
            "seed": seed,
        }
        self.fingerprint = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()
        self._order = lru_cache(maxsize=2)(self._make_order)  # this epoch's and the next one's

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps in an epoch (packs may differ by a few between epochs)."""
        return math.ceil(len(self.order(epoch)) / (self.accumulation * self.world_size))

    def step(self, epoch: int, index: int) -> StepBatch:
        """Step `index` of `epoch`, made now."""
        if not 0 <= index < self.steps_per_epoch(epoch):
            raise IndexError(f"step {index} of epoch {epoch}, which has {self.steps_per_epoch(epoch)}")
        size = self.accumulation * self.world_size
        micro_batches = self.order(epoch)[index * size : (index + 1) * size]
        total = float(sum(self.data.weights[row].sum() for rows in micro_batches for row in rows))
        mine: list[Batch] = []
        for turn in range(math.ceil(len(micro_batches) / self.world_size)):
            place = turn * self.world_size + self.rank
            batch = self._collate(micro_batches[min(place, len(micro_batches) - 1)])
            mine.append(batch if place < len(micro_batches) else _silent(batch))
        return StepBatch(mine, total)

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]:
        """Steps of an epoch from `start` on, prepared ahead by `num_workers` threads."""
        indices = range(start, self.steps_per_epoch(epoch))  # puts the epoch in order, before any thread asks
        if self.num_workers == 0:
            yield from (self.step(epoch, index) for index in indices)
            return
        ready: deque[Future[StepBatch]] = deque()
        threads = ThreadPoolExecutor(self.num_workers, "batches")
        try:
            for index in indices:
                ready.append(threads.submit(self.step, epoch, index))
                if len(ready) > AHEAD * self.num_workers:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

    def order(self, epoch: int) -> EpochOrder:
        """Which documents share a row, and which rows a micro-batch, in `epoch`."""
        return self._order(epoch)

    def _make_order(self, epoch: int) -> EpochOrder:
        return epoch_order(
            self.data.lengths,
            self.data.repeats,
            micro_batch_size=self.micro_batch_size,
            micro_batches_per_step=self.accumulation * self.world_size,
            pack_tokens=self.max_length if self.packing else None,
            group_by_length=self.group_by_length,
            seed=self.seed,
            epoch=epoch,
        )

    def widths(self, epoch: int) -> Order:
        """int64 [M], tokens per row of each micro-batch, padding included."""
        return self._width(self.order(epoch).widest_rows(self.data.lengths))

    @property
    def longest(self) -> int:
        """Tokens of the widest row that any epoch can have, padding included."""
        return int(self._width(self.data.lengths.max()))

    def _width(self, longest: Order) -> Order:
        """`max_length` when packing, else the longest row rounded up to 8."""
        if self.packing:
            return np.full_like(longest, self.max_length)
        return np.minimum(self.max_length, -(-longest // 8) * 8)

    def heaviest(self, epoch: int) -> Batch:
        """The micro-batch of `epoch` with the most tokens, padding included: the one to rehearse with."""
        order = self.order(epoch)
        rows = np.minimum(
            order.micro_batch_size, order.n_rows - np.arange(len(order)) * order.micro_batch_size
        )
        return self._collate(order[int(np.argmax(rows * self.widths(epoch)))])

    def _collate(self, rows: Sequence[Order]) -> Batch:
        longest = max(int(self.data.lengths[row].sum()) for row in rows)
        return collate(self.data, rows, int(self._width(np.asarray(longest))), self.pad_id)


def collate(data: TokenizedData, rows: Sequence[Order], width: int, pad_id: int) -> Batch:
    """A Batch of `width` tokens a row, the documents of each row one after another."""
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    position_ids = np.zeros(shape, dtype=np.int64)
    document_ids = np.full(shape, -1, dtype=np.int32)
    for row, members in enumerate(rows):
        at = 0
        for number, index in enumerate(members):
            document = data.document(int(index))
            span = slice(at, at := at + len(document.ids))
            input_ids[row, span] = document.ids
            loss_weights[row, span] = document.weights
            position_ids[row, span] = np.arange(len(document.ids))
            document_ids[row, span] = number
    labels = np.where(loss_weights > 0, input_ids, IGNORE)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        rows=tuple(int(index) for members in rows for index in members),
    )


def _silent(batch: Batch) -> Batch:
    """The same tokens, teaching nothing."""
    return replace(
        batch,
        labels=torch.full_like(batch.labels, IGNORE),
        loss_weights=torch.zeros_like(batch.loss_weights),
        rows=(),
    )
