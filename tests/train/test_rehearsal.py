"""A rehearsal leaves nothing behind, and says before step 1 what does not fit."""

import pytest
import torch

from qlora_trainer.checkpoint import rng
from qlora_trainer.errors import OutOfMemoryError
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim import make_optimizer
from qlora_trainer.train.health import MemoryGuard
from qlora_trainer.train.job import MicroStep
from qlora_trainer.train.rehearsal import rehearse, widest
from tests import tiny
from tests.batches import collate, documents

CPU = torch.device("cpu")
BATCHES = [collate([[d] for d in documents([5, 9])]), collate([[d] for d in documents([30, 4])])]


def test_the_widest_batch_is_the_one_that_is_tried():
    assert widest(BATCHES) is BATCHES[1]
    assert widest([]) is None


def reference():
    model = tiny.model(attention_dropout=0.5).train()
    return model, ReferenceForward(model)


def fast():
    base = tiny.model().requires_grad_(False)
    model = attach(base, LoraOptions(r=4, lora_dropout=0.5), seed=0).train()
    forward, report = fuse(model)
    assert not report.fallbacks
    return model, forward


@pytest.mark.parametrize("path", [reference, fast])
def test_a_rehearsal_is_undone_exactly(path):
    model, forward = path()
    optimizer = make_optimizer("adamw", model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}, rng.capture()
    seen = []
    rehearse(
        lambda batch: seen.append(batch) or MicroStep(forward, sft, CPU)(batch),
        BATCHES[1], forward, BATCHES[0], optimizer, MemoryGuard(CPU),
    )  # fmt: skip
    assert seen == [BATCHES[1]]
    assert not optimizer.grad.any()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[0][name])
    for name, state in rng.capture().items():
        assert torch.equal(state, before[1][name]), name


def test_what_does_not_fit_is_said_before_step_1():
    model = tiny.model()
    optimizer = make_optimizer("adamw", model.named_parameters())

    def too_big(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    guard = MemoryGuard(CPU, planned=3 << 30, remedies=lambda: ("train.max_length=256",))
    with pytest.raises(OutOfMemoryError, match=r"step 1.*planned peak 3\.00 GiB.*train\.max_length=256"):
        rehearse(too_big, BATCHES[1], too_big, None, optimizer, guard)
