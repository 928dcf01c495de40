"""What Python, the system and the libraries raise, and the places of a run where it is raised.

Every error here was seen in use. A run may fail with any of them at any seam; `broken` makes one do so
in this process, and `problems` says what of the promise does not hold afterwards.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jinja2
import pyarrow
import torch
from safetensors import SafetensorError

from qlora_trainer.__main__ import main
from qlora_trainer.checkpoint import format
from qlora_trainer.commands import train as command
from qlora_trainer.data import Loader
from qlora_trainer.errors import REFUSALS, DataError, is_out_of_memory
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.track.jsonl import JsonlTracker
from qlora_trainer.train.job import MicroStep
from tests.faults.scene import Scene, differences, metrics

Raiser = Callable[[], BaseException]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def not_json() -> Exception:
    try:
        json.loads("{")
    except ValueError as error:
        return error
    raise AssertionError


def system(number: int) -> Exception:
    return OSError(number, os.strerror(number))


# name -> how it is made, and its exit code
ERRORS: dict[str, tuple[Raiser, int]] = {
    **{errno.errorcode[number]: (lambda n=number: system(n), 74) for number in REFUSALS},  # type: ignore[misc]
    "named file": (lambda: OSError(errno.EIO, os.strerror(errno.EIO), "/data/a"), 74),
    "wrapped": (lambda: caused(RuntimeError("while generating"), system(errno.ENOSPC)), 74),
    "safetensors: I/O": (
        lambda: SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        74,
    ),
    "safetensors: header": (lambda: SafetensorError("Error while deserializing header: too small"), 70),
    "file gone": (lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/a"), 66),
    "CUDA memory": (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2),
    "cuBLAS memory": (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"), 2),
    "host memory": (lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to …"), 2),
    "Python memory": (lambda: MemoryError(), 2),
    "fork memory": (lambda: system(errno.ENOMEM), 2),
    "CUDA": (lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel …"), 70),
    "shapes": (lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), 70),
    "worker": (lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. …"), 70),
    "pool": (lambda: BrokenProcessPool("A process in the process pool was terminated abruptly"), 70),
    "threads": (lambda: RuntimeError("can't start new thread"), 74),
    "not UTF-8": (lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 70),
    "not JSON": (not_json, 70),
    "key": (lambda: KeyError("eval_loss"), 70),
    "index": (lambda: IndexError("index 9 is out of bounds"), 70),
    "value": (lambda: ValueError("two\nlines"), 70),
    "type": (lambda: TypeError("unsupported operand"), 70),
    "assertion": (lambda: AssertionError(), 70),
    "recursion": (lambda: RecursionError("maximum recursion depth exceeded"), 70),
    "exhausted": (lambda: StopIteration(), 70),
    "template": (lambda: jinja2.TemplateError("no filter named 'x'"), 70),
    "Arrow": (lambda: pyarrow.ArrowInvalid("Parquet magic bytes not found"), 70),
    "Arrow I/O": (lambda: pyarrow.ArrowIOError("cannot read"), 70),
    "ours": (lambda: DataError("a.jsonl:3: broken"), 65),
}


@dataclass(frozen=True)
class Seam:
    """A function of the product that a run calls, and in which call it fails.

    Attributes:
        call: from 1.
        tries: a memory error has to come so often, because it is tried again.
        after: whether the call has done its work when it fails.
        kept: the step of the newest checkpoint afterwards.
        lost: the step whose record could not be written, and is missed in the finished run.
    """

    owner: Any
    name: str
    call: int
    kept: int
    after: bool = False
    tries: int = 1
    lost: int = 0


STEPS = 6
# Six steps of two micro-batches, saved every two, evaluated after three; failures in step 4 or just before.
KEYS: dict[str, Any] = {
    "train.max_steps": STEPS,
    "checkpoint.save_steps": 2,
    "evaluate.enabled": "true",
    "evaluate.eval_steps": 3,
    "evaluate.max_rows": 2,
}
SEAMS = {
    "batch": Seam(Loader, "step", 4, kept=3),
    "forward": Seam(MicroStep, "__call__", 7, kept=3, tries=2),
    "second backward": Seam(MicroStep, "__call__", 8, kept=3, after=True, tries=2),
    "update": Seam(AdamW, "step", 4, kept=2, after=True),
    "record": Seam(JsonlTracker, "log", 3, kept=3, lost=3),
    "evaluation": Seam(command, "measure_loss", 1, kept=3, tries=2),
    "save": Seam(format, "write", 2, kept=2, after=True),
    "removing old checkpoints": Seam(command.publish, "retain", 2, kept=4),
    "comparison": Seam(command.comparison, "compare", 1, kept=STEPS),
    "adapter": Seam(command, "export_adapter", 1, kept=STEPS),
}


@contextmanager
def broken(seam: Seam, error: Raiser, calls: int) -> Iterator[None]:
    """The seam fails in its call, and in those after it up to `calls`."""
    original, made = getattr(seam.owner, seam.name), [0]

    def failing(*arguments: Any, **keywords: Any) -> Any:
        made[0] += 1
        fails = seam.call <= made[0] < seam.call + calls
        result = original(*arguments, **keywords) if seam.after or not fails else None
        if fails:
            raise error()
        return result

    with patch.object(seam.owner, seam.name, failing):
        yield
    assert made[0] >= seam.call, f"{seam.name} was called {made[0]} times"


def attempt(line: list[str]) -> tuple[int, str]:
    """Exit code and what a command line prints, in this process."""
    printed = io.StringIO()
    with redirect_stderr(printed), redirect_stdout(printed):
        return main(line), printed.getvalue()


def problems(scene: Scene, whole: Path, output: str, place: str, name: str) -> list[str]:
    """What does not hold of a run in which the error `name` is raised at a place; then it is run again."""
    seam, (error, expected), found = SEAMS[place], ERRORS[name], []
    if place == "save" and isinstance(error(), OSError | SafetensorError):
        expected = 74  # whatever the system says of a file that is written
    line = scene.line(output, **KEYS, **{"data.eval_path": scene.folder / "eval.json"})
    with broken(seam, error, seam.tries if is_out_of_memory(error()) else 1):
        code, text = attempt(line)
    run = scene.folder / output
    if code != expected:
        found.append(f"exit {code} instead of {expected}")
    said = re.findall(r"^error: (.*)$", text, flags=re.MULTILINE)
    if len(said) != 1 or "Traceback" in text or not text.endswith(f"error: {said[0]}\n"):
        found.append(f"not one line: {text}")
    elif seam.kept < STEPS and f"the state after step {seam.kept} is saved" not in said[0]:
        found.append(f"says {said[0]!r}")
    if scene.steps(output)[-1] != seam.kept:
        found.append(f"checkpoints {scene.steps(output)}, not {seam.kept}")
    wrong = {path.name: format.verify(path) for path in (run / "checkpoints").iterdir()}
    found += [f"{name}: {lines}" for name, lines in wrong.items() if lines]
    found += [f"left behind: {path.name}" for path in run.rglob(".*") if path.name != ".lock"]
    status = scene.status(output)
    if (status["state"], status["exit_code"]) != ("failed", expected) or status["message"] not in said:
        found.append(f"status.json says {status['state']} {status['exit_code']} {status['message']!r}")
    code, text = attempt(line)
    if code != 0:
        return [*found, f"the same line again: exit {code}: {text}"]
    lost = [record["step"] for record in metrics(whole) if record not in metrics(run)]
    if lost == [seam.lost]:
        shutil.copy(whole / "metrics.jsonl", run)
    return found + differences(whole, run)
