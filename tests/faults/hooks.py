"""Faults at exact places of a run, applied in its own process (`zygote`) before it starts.

Also imports everything a run needs, so that forked runs start in milliseconds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import qlora_trainer.commands.train  # noqa: F401
from qlora_trainer.checkpoint import rng
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.data import Loader
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.track.jsonl import JsonlTracker
from qlora_trainer.train.loop import MicroStep
from qlora_trainer.train.signals import StopSignals
from qlora_trainer.train.state import RunState


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


def signal_in_phase(phase: str, number: int, step: int = 0) -> None:
    """Sends a signal in the middle of a phase."""
    original = StopSignals.phase

    @contextmanager
    def entering(self: StopSignals, name: str, **options: Any) -> Iterator[None]:
        with original(self, name, **options):
            if name == phase:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            yield

    setattr(StopSignals, "phase", entering)  # noqa: B010


def slow_phase(phase: str, seconds: float) -> None:
    """Makes a phase take long, and says so."""
    original = StopSignals.phase

    @contextmanager
    def entering(self: StopSignals, name: str, **options: Any) -> Iterator[None]:
        with original(self, name, **options):
            if name == phase:
                print(f"in {name}", flush=True)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    time.sleep(0.05)
            yield

    setattr(StopSignals, "phase", entering)  # noqa: B010


def slow_steps(seconds: float) -> None:
    """Makes every micro-batch take long, so that a test can act in the middle of a step."""
    _after(MicroStep, "__call__", lambda *_: time.sleep(seconds))


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
    """These forward passes (from 1) fail as CUDA's allocator does."""
    original = MicroStep.__call__
    made = [0]

    def failing(self: MicroStep, batch: Any) -> Any:
        made[0] += 1
        loss = original(self, batch)  # gradients of the failed pass are there already: they must go
        if made[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss

    setattr(MicroStep, "__call__", failing)  # noqa: B010


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
