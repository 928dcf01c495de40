"""Faults at exact places of a run, applied in its own process (`zygote`) before it starts.

Also imports everything a run needs, so that forked runs start in milliseconds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import psutil
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import qlora_trainer.commands.train as train_command
from qlora_trainer.checkpoint import rng
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.data import Loader
from qlora_trainer.export import verify
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.track.jsonl import JsonlTracker
from qlora_trainer.train import loop
from qlora_trainer.train.signals import StopSignals
from qlora_trainer.train.state import RunState
from tests.export import runs

CLONE_NEWNET = 0x40000000  # linux/sched.h


def _after(owner: type, name: str, act: Callable[..., None]) -> None:
    """Calls `act(self, result, *arguments)` after every call of a method."""
    original = getattr(owner, name)

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        act(self, result, *arguments)
        return result

    setattr(owner, name, method)


# ---- stopping ----------------------------------------------------------------------------------


def signal_at_step(step: int, *numbers: int) -> None:
    """Sends this process signals right after the record of a step, before its boundary."""

    def send(self: Any, result: None, record: dict[str, Any]) -> None:
        if record["step"] == step and "loss" in record:
            for number in numbers:
                os.kill(os.getpid(), number)

    _after(JsonlTracker, "log", send)


def signal_in_phase(phase: str, number: int) -> None:
    """Sends a signal in the middle of a phase, the first time that it is entered."""

    def send() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.05)

    _in_phase(phase, send)


def slow_phase(phase: str, seconds: float) -> None:
    """Makes a phase take long, the first time, and says so."""

    def wait() -> None:
        print(f"in {phase}", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)

    _in_phase(phase, wait)


def _in_phase(phase: str, act: Callable[[], None]) -> None:
    original = StopSignals.phase
    todo = [act]

    @contextmanager
    def entering(self: StopSignals, name: str, **options: Any) -> Iterator[None]:
        with original(self, name, **options):
            if name == phase and todo:
                todo.pop()()
            yield

    setattr(StopSignals, "phase", entering)  # noqa: B010


def _after_micro_batch(act: Callable[[Any], None]) -> None:
    """Calls `act(batch)` after every forward and backward, whichever path makes them."""
    original = loop._accumulate

    def accumulate(job: Any, *arguments: Any) -> Any:
        def step(batch: Any) -> Any:
            loss = job.micro_step(batch)
            act(batch)
            return loss

        return original(dataclasses.replace(job, micro_step=step), *arguments)

    setattr(loop, "_accumulate", accumulate)  # noqa: B010


def slow_micro_batches(seconds: float) -> None:
    """Makes every micro-batch take long, and says when each is done."""

    def wait(batch: Any) -> None:
        print(f"micro-batch of rows {batch.rows}", flush=True)
        time.sleep(seconds)

    _after_micro_batch(wait)


def signal_at_micro_batch(number: int, *signals: int) -> None:
    """Sends this process signals after its so-manieth micro-batch; for ranks that log nothing."""
    made = [0]

    def send(batch: Any) -> None:
        made[0] += 1
        if made[0] == number:
            for each in signals:
                os.kill(os.getpid(), each)

    _after_micro_batch(send)


def impatient(seconds: float) -> None:
    """How long a step may have taken already and still be finished when the run has to stop."""
    loop.PATIENCE = seconds


def kill_children_at_step(step: int) -> None:
    """Kills every process that this one has started: a tracker's service."""

    def kill(self: JsonlTracker, result: None, record: dict[str, Any]) -> None:
        if record["step"] == step:
            for child in psutil.Process().children(recursive=True):
                child.kill()

    _after(JsonlTracker, "log", kill)


def no_network() -> None:
    """Moves this process into a network namespace without interfaces (needs root), as `unshare -n`."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def bug(message: str, number: int = 1) -> None:
    """An error that nobody expects, in the so-manieth micro-batch."""
    made = [0]

    def fail(batch: Any) -> None:
        made[0] += 1
        if made[0] == number:
            raise RuntimeError(message)

    _after_micro_batch(fail)


def bug_in_evaluation(message: str) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError(message)

    setattr(train_command, "measure_loss", fail)  # noqa: B010


# ---- numbers and memory ------------------------------------------------------------------------


def poison_steps(value: str, *steps: int) -> None:
    """Loss weights of one token of these steps (from 1, in the order they are made) become `value`."""
    original = Loader.steps
    made = [0]

    def poisoned(self: Loader, epoch: int, start: int = 0) -> Iterator[Any]:
        for batch in original(self, epoch, start):
            made[0] += 1
            if made[0] in steps:
                weights = batch.micro_batches[0].loss_weights
                weights[0, int((weights[0] > 0).nonzero()[0])] = float(value)
            yield batch

    setattr(Loader, "steps", poisoned)  # noqa: B010


def out_of_memory(*calls: int) -> None:
    """These micro-batches (from 1) fail as CUDA's allocator does, after their gradients have been added."""
    made = [0]

    def fail(batch: Any) -> None:
        made[0] += 1
        if made[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    _after_micro_batch(fail)


def threads(number: int) -> None:
    torch.set_num_threads(number)


def free_space(size: int, after: int) -> None:
    """Every disk says that it has so many bytes left, from the so-manieth time on that it is asked."""
    original, asked = shutil.disk_usage, [0]

    def usage(path: Any) -> Any:
        asked[0] += 1
        return original(path)._replace(free=size) if asked[0] > after else original(path)

    setattr(shutil, "disk_usage", usage)  # noqa: B010


def file_size_limit_at_step(step: int, size: int) -> None:
    """From a step on no file can grow over `size` bytes, as on a disk that has become full."""

    def limit(self: JsonlTracker, result: None, record: dict[str, Any]) -> None:
        if record["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    _after(JsonlTracker, "log", limit)


# ---- mutants: each breaks resuming in one way, and the bit-exact check must see it ----------------


def mutant_rng_not_restored() -> None:
    setattr(rng, "restore", lambda states: None)  # noqa: B010


def mutant_loader_off_by_one() -> None:
    def shift(self: RunState, result: None, checkpoint: Checkpoint) -> None:
        self.progress.index += 1

    _after(RunState, "restore", shift)


def mutant_epoch_reset() -> None:
    def reset(self: RunState, result: None, checkpoint: Checkpoint) -> None:
        self.progress.epoch = 0

    _after(RunState, "restore", reset)


def mutant_moment_zeroed() -> None:
    original = AdamW.load_state_tensors

    def zeroed(self: AdamW, state: dict[str, Any]) -> None:
        key = next(key for key in sorted(state) if key.startswith("exp_avg."))
        fill = 127 if state[key].dtype == torch.uint8 else 0  # the 8-bit code of zero
        original(self, {**state, key: torch.full_like(state[key], fill)})

    setattr(AdamW, "load_state_tensors", zeroed)  # noqa: B010


def mutant_adapter_initialised_again() -> None:
    original = AdamW.load_state_tensors

    def fresh(self: AdamW, state: dict[str, Any]) -> None:
        masters = {key: value for key, value in self.state_tensors().items() if key.startswith("master.")}
        original(self, {**state, **masters})

    setattr(AdamW, "load_state_tensors", fresh)  # noqa: B010


MUTANTS = sorted(name for name in list(globals()) if name.startswith("mutant_"))
SIGTERM, SIGUSR1, SIGKILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL


def probe_here() -> None:
    """Measures exports in this process: starting another takes seconds, most of them for importing torch."""
    verify.run_probe = runs.probe_here
