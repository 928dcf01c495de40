"""Encoding by several processes: as one would, whatever happens to them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from qlora_trainer.data.parallel import encode_all
from qlora_trainer.errors import Bug, CheckpointError, DataError, PreemptedError, QLoRAError
from tests.system.test_processes import gone


class Encoder:
    """Stands in for the real one: numbers for examples, and commands to die."""

    def __init__(self) -> None:
        self.notes: dict[str, list[int]] = {}

    def __call__(self, examples: list[Any]) -> list[Any]:
        for example in examples:
            if isinstance(example, signal.Signals):
                faulthandler.disable()  # pytest's would print where a process dies that is meant to
                os.kill(os.getpid(), example)
            elif isinstance(example, Exception):
                raise example
        self.notes = {"seen": list(range(len(examples)))}
        return [(example, "x" * 5000) for example in examples]


def encoded(batches: list[list[Any]], workers: int) -> list[Any]:
    return list(encode_all(Encoder(), enumerate(batches), workers))  # type: ignore[arg-type]


def test_several_processes_give_what_one_gives_in_order() -> None:
    """Batches of more than a pipe holds: none waits for the other."""
    batches = [[number] * 100 for number in range(12)]
    assert encoded(batches, 3) == encoded(batches, 1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("example", "error", "says"),
    [
        (signal.SIGKILL, PreemptedError, "short of memory: free some, and run the same command again"),
        (signal.SIGBUS, CheckpointError, "cut short"),
        (signal.SIGSEGV, Bug, "SIGSEGV"),
        (DataError("a.json:3: broken"), DataError, "a.json:3: broken"),
        (KeyError("content"), Bug, "this is a bug.*KeyError: 'content'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), Bug, "UnicodeDecodeError"),
    ],
    ids=str,
)
def test_a_worker_that_dies_or_raises_is_one_line(example: Any, error: type[QLoRAError], says: str) -> None:
    """`BrokenProcessPool: a child process terminated abruptly` was a bug of ours, exit 70."""
    before = threading.active_count()
    with pytest.raises(error, match=says) as raised:
        encoded([[1], [2], [example], [3], [4]] + [[5]] * 9, 2)
    assert type(raised.value) is error and "\n" not in str(raised.value)
    assert multiprocessing.active_children() == [] and threading.active_count() == before
    if isinstance(example, Exception):
        assert "in __call__" in str(raised.value.__cause__), "-v shows where it was raised"


def test_a_caller_that_stops_early_leaves_no_process() -> None:
    encoding = encode_all(Encoder(), ((number, [number]) for number in range(100)), 2)  # type: ignore[arg-type]
    assert next(encoding)[0] == 0
    assert len(multiprocessing.active_children()) == 2
    encoding.close()
    assert multiprocessing.active_children() == []


def test_no_semaphore_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """They live in /dev/shm, which may be full or missing; a pool could not start."""

    def refused(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refused)
    with pytest.raises(OSError, match="No space left"):
        multiprocessing.get_context("fork").Queue()
    assert len(encoded([[1], [2], [3]], 2)) == 3


def test_no_worker_outlives_the_process_it_works_for() -> None:
    program = (
        "import multiprocessing, time; from tests.data.test_parallel import Encoder, encode_all\n"
        "encoding = encode_all(Encoder(), ((n, [n]) for n in range(100)), 2); next(encoding)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    for worker in workers:
        gone(worker)
