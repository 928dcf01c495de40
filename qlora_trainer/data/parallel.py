"""Many examples encoded by several processes, in order and in bounded memory.

Rendering templates is Python's work and takes as long as tokenizing; one process would leave most of a
machine idle. Processes are forked, so they share the tokenizer, and a few batches are under way at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from qlora_trainer.data.encode import Document, Dropped, Encoder
from qlora_trainer.data.example import Example
from qlora_trainer.data.problems import RowError

MOST_PROCESSES = 16
Carried = TypeVar("Carried")
Result = list[Document] | Dropped | RowError
Notes = dict[str, list[int]]  # note -> indices of the batch's examples

_encoder: Encoder | None = None  # of a worker process


def processes() -> int:
    """How many the machine has cores for; 1 where processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def encode_all(
    encoder: Encoder, batches: Iterable[tuple[Carried, list[Example]]], workers: int
) -> Generator[tuple[Carried, list[Result], Notes], None, None]:
    """Encode each batch's examples; hand back what the batch carried, results and notes, in order."""
    if workers <= 1:
        for carried, examples in batches:
            yield carried, encoder(examples), encoder.notes
        return
    context = multiprocessing.get_context("fork")
    under_way: deque[tuple[Carried, Future[tuple[list[Result], Notes]]]] = deque()

    def finished() -> tuple[Carried, list[Result], Notes]:
        carried, future = under_way.popleft()
        return carried, *future.result()

    with ProcessPoolExecutor(workers, context, _begin, (encoder,)) as pool:
        for carried, examples in batches:
            under_way.append((carried, pool.submit(_encode, examples)))
            if len(under_way) > 2 * workers:
                yield finished()
        while under_way:
            yield finished()


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this is the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _encode(examples: list[Example]) -> tuple[list[Result], Notes]:
    assert _encoder is not None
    return _encoder(examples), _encoder.notes
