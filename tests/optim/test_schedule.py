"""Schedules give transformers' numbers exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from qlora_trainer.optim import schedule

THEIRS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("total", [2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("name", schedule.NAMES)
def test_learning_rate_equals_transformers(name: str, ratio: float, total: int) -> None:
    warmup = schedule.warmup_steps(ratio, total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = get_scheduler(THEIRS[name], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = schedule.learning_rate(name, step, peak=2e-4, warmup=warmup, total=total)
        assert ours == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("name", schedule.NAMES)
def test_the_only_step_of_a_run_learns(name: str, ratio: float) -> None:
    warmup = schedule.warmup_steps(ratio, 1)
    assert schedule.learning_rate(name, 0, peak=2e-4, warmup=warmup, total=1) == 2e-4


def test_warmup_steps_equal_transformers(tmp_path) -> None:
    for ratio, total in [(0.03, 10), (0.03, 1000), (0.1, 333), (0.0, 50)]:
        arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True)
        assert schedule.warmup_steps(ratio, total) == arguments.get_warmup_steps(total)
