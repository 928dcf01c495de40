"""Many examples encoded by several processes, in order and in bounded memory.

Rendering templates is Python's work and takes as long as tokenizing; one process would leave most of a
machine idle. Processes are forked, so they share the tokenizer, and each is spoken to through a pipe of its
own: nothing is shared that a full /dev/shm could refuse, and one that dies is heard of at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from qlora_trainer.data.encode import Document, Dropped, Encoder
from qlora_trainer.data.example import Example
from qlora_trainer.data.problems import RowError
from qlora_trainer.errors import Bug, CheckpointError, PreemptedError, QLoRAError, explained
from qlora_trainer.system.processes import shield_worker

MOST_PROCESSES = 16
Carried = TypeVar("Carried")
Result = list[Document] | Dropped | RowError
Notes = dict[str, dict[int, str]]  # as `Encoder.notes`, of the batch's examples
Encoded = tuple[list[Result], Notes]


def processes() -> int:
    """How many the machine has cores for; 1 where processes cannot be forked."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def encode_all(
    encoder: Encoder, batches: Iterable[tuple[Carried, list[Example]]], workers: int
) -> Generator[tuple[Carried, list[Result], Notes], None, None]:
    """Encode each batch's examples; hand back what the batch carried, results and notes, in order.

    Raises:
        PreemptedError: a worker was killed from outside.
    """
    if workers <= 1:
        for carried, examples in batches:
            yield carried, encoder(examples), encoder.notes
        return
    team = _Team(encoder, workers)
    under_way: deque[tuple[Carried, Future[Encoded]]] = deque()
    threads = ThreadPoolExecutor(workers, "encoding")  # each waits for a process

    def finished() -> tuple[Carried, list[Result], Notes]:
        carried, future = under_way.popleft()
        return carried, *future.result()

    try:
        for carried, examples in batches:
            under_way.append((carried, threads.submit(team.encode, examples)))
            if len(under_way) > 2 * workers:
                yield finished()
        while under_way:
            yield finished()
    finally:
        team.end()
        threads.shutdown(cancel_futures=True)


class _Team:
    """Processes that each encode one batch at a time."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        try:
            for _ in range(size):
                self._all.append(_Worker(encoder))
                self._idle.put(self._all[-1])
        except BaseException:
            self.end()
            raise

    def encode(self, examples: list[Example]) -> Encoded:
        """The next idle process does it; called by as many threads as there are processes."""
        worker = self._idle.get()
        try:
            return worker.encode(examples)
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        for worker in self._all:
            worker.end()


class _Worker:
    def __init__(self, encoder: Encoder) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(theirs, encoder), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    def encode(self, examples: list[Example]) -> Encoded:
        answer: Encoded | tuple[QLoRAError, str]
        try:
            self._pipe.send(examples)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise _died(self._process.exitcode or 0) from None
        if isinstance(answer[0], QLoRAError):
            raise answer[0] from RuntimeError(f"in a worker:\n{answer[1]}")
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        with suppress(OSError):
            self._pipe.close()


def _died(code: int) -> QLoRAError:
    """What a worker's exit code, negative for a signal, means for the run."""
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        return PreemptedError(
            "tokenizing: a worker process was killed, as a system does that is short of memory: "
            "free some, and run the same command again"
        )
    if code == -signal.SIGBUS:
        return CheckpointError("tokenizing: a file that is being read was cut short, or its disk fails")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Bug(f"this is a bug, please report it: tokenizing: a worker process ended with {how}")


def _serve(pipe: Connection, encoder: Encoder) -> None:
    """A worker's life: batches in, results or what was raised out."""
    shield_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this is the parallelism
    while True:
        examples = pipe.recv()
        try:
            pipe.send((encoder(examples), encoder.notes))
        except Exception as error:
            pipe.send((explained(error), traceback.format_exc()))
