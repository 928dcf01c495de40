"""A checkpoint holds all that a run is made of, and a run becomes what a checkpoint holds."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from qlora_trainer.checkpoint import format
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.job import Progress
from qlora_trainer.train.state import RunState
from tests import tiny

CPU = torch.device("cpu")
SAVED = Progress(
    step=7,
    epoch=2,
    index=3,
    tokens=11,
    supervised=5,
    nonfinite=1,
    best_loss=0.1 + 0.2,
    best_step=4,
    evaluated=6,
)


def state(model: Path, progress: Progress, seed: int) -> RunState:
    adapted = attach(load_base(BaseOptions(str(model)), CPU), LoraOptions(r=4), seed)
    optimizer = AdamW(adapted.named_parameters())
    return RunState(adapted, optimizer, progress, {"seed": 1}, Ranks(CPU))


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_a_run_becomes_what_its_checkpoint_holds(tmp_path: Path) -> None:
    """Every field: a best loss that is forgotten makes the next evaluation the best one."""
    changed = [field.name for field in fields(Progress) if getattr(SAVED, field.name) == field.default]
    assert changed == [], "every field of the saved one is unlike a new one's"
    model = tiny.save(tmp_path / "model")
    before = state(model, SAVED, seed=1)
    before.optimizer.grad.normal_(generator=torch.Generator().manual_seed(0))
    before.optimizer.step(0.1, 1.0)
    folder = before.save(tmp_path)
    assert folder is not None
    expected = draws()

    after = state(model, Progress(), seed=2)
    after.restore(format.read(folder))
    assert after.progress == SAVED
    assert draws() == expected
    theirs = after.optimizer.state_tensors()
    assert all(tensor.equal(theirs[name]) for name, tensor in before.optimizer.state_tensors().items())
    pairs = zip(before.model.named_parameters(), after.model.named_parameters(), strict=True)
    assert all(name == other and mine.equal(its) for (name, mine), (other, its) in pairs)
