"""The loop's promises: one large batch whatever the accumulation, exact steps, skipped non-finite ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from qlora_trainer.errors import DivergedError, PreemptedError
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.health import MemoryGuard
from qlora_trainer.train.job import Job, MicroStep, Progress, count_steps
from qlora_trainer.train.loop import train
from tests import tiny
from tests.batches import collate, documents

CPU = torch.device("cpu")


@dataclass
class StepBatch:
    micro_batches: list
    total_weight: float


@dataclass
class Loader:
    """Epochs of `length` optimizer steps of eight documents, in `accumulation` micro-batches."""

    accumulation: int = 1
    length: int = 4
    new_every_epoch: bool = True
    seen: list = field(default_factory=list)

    def steps_per_epoch(self, epoch):
        return self.length

    def steps(self, epoch, start=0):
        yield from (self.step(epoch, index) for index in range(start, self.steps_per_epoch(epoch)))

    def step(self, epoch, index):
        self.seen.append((epoch, index))
        docs = documents([5, 9, 3, 12, 7, 4, 8, 6], seed=100 * epoch * self.new_every_epoch + index)
        size = len(docs) // self.accumulation
        batches = [collate([[d] for d in docs[i : i + size]]) for i in range(0, len(docs), size)]
        return StepBatch(batches, sum(float(b.loss_weights.sum()) for b in batches))


def run(loader, *, steps=4, model=None, progress=None, **callbacks):
    model = model or tiny.model()
    parameters = [(n, p) for n, p in model.named_parameters() if "proj" in n]
    model.requires_grad_(False)
    for _, parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = AdamW(parameters)
    micro_step = MicroStep(ReferenceForward(model), sft, CPU)
    records = []
    callbacks = {"log": records.append, "save": lambda progress: None} | callbacks
    progress = train(
        Job(
            progress or Progress(), micro_step, optimizer, loader, Ranks(CPU), MemoryGuard(CPU),
            lambda step: 1e-3, total_steps=steps, max_grad_norm=1.0, save_steps=2, **callbacks,
        )
    )  # fmt: skip
    return records, progress, [p.detach().clone() for _, p in parameters]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_micro_batches_equal_one_large_batch(accumulation):
    one, _, weights_one = run(Loader(1))
    many, _, weights_many = run(Loader(accumulation))
    for a, b in zip(one, many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    for a, b in zip(weights_one, weights_many, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)  # Adam amplifies rounding of tiny gradients


def test_every_step_is_asked_for_once_and_logged():
    loader = Loader(length=3)
    records, progress, _ = run(loader, steps=5)
    assert loader.seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert (progress.step, progress.epoch, progress.index) == (5, 1, 2)
    assert progress.tokens == 5 * 54
    assert len({r["batch"] for r in records}) == 5


def test_it_saves_every_so_often_and_at_the_end():
    saved = []
    run(Loader(), steps=5, save=lambda progress: saved.append(progress.step))
    assert saved == [2, 4, 5]


def test_evaluation_remembers_the_best():
    losses = iter([3.0])
    records, progress, _ = run(Loader(), steps=2, evaluate=lambda: {"eval_loss": next(losses)})
    assert (progress.best_loss, progress.best_step) == (3.0, 2)
    assert records[-1] == {"step": 2, "eval_loss": 3.0}


def test_a_best_loss_from_before_is_only_beaten_by_a_lower_one():
    losses = iter([2.5, 2.0, 1.0])
    best = Progress(step=0, best_loss=2.0, best_step=1)
    seen = []
    for steps in (2, 4, 6):
        _, best, _ = run(Loader(), steps=steps, progress=best, evaluate=lambda: {"eval_loss": next(losses)})
        seen.append((best.best_loss, best.best_step))
    assert seen == [(2.0, 1), (2.0, 1), (1.0, 6)]


def test_a_stop_request_saves_at_the_step_boundary():
    saved, records = [], []
    with pytest.raises(PreemptedError, match="after step 3 of 4"):
        run(
            Loader(),
            log=records.append,
            save=lambda p: saved.append(p.step),
            stop_requested=lambda: len(records) == 3,
        )
    assert saved == [2, 3]


def test_three_nonfinite_steps_end_the_run_and_leave_the_weights():
    model = tiny.model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    records = []

    class Poisoned(Loader):
        def step(self, epoch, index):
            batch = super().step(epoch, index)
            batch.micro_batches[0].loss_weights[0, 2] = float("nan")
            return batch

    with pytest.raises(DivergedError, match=r"3 steps in a row, up to step 3 \(data rows 0, 1, 2"):
        run(Poisoned(), model=model, log=records.append)
    assert all(r["nonfinite"] and r["rows"] == list(range(8)) for r in records)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_one_nonfinite_step_is_skipped_and_training_goes_on():
    class Once(Loader):
        def step(self, epoch, index):
            batch = super().step(epoch, index)
            if index == 1:
                batch.micro_batches[0].loss_weights[0, 2] = float("inf")
            return batch

    records, progress, _ = run(Once())
    assert [bool(r.get("nonfinite")) for r in records] == [False, True, False, False]
    assert progress.nonfinite == 0


def test_epochs_may_be_a_fraction():
    assert count_steps(Loader(length=10), 2) == 20
    assert count_steps(Loader(length=10), 0.25) == 3
    assert count_steps(Loader(length=10), 1.5) == 15
