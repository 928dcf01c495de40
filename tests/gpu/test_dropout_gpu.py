"""LoRA dropout on a GPU: as close to float32 as the reference with the same masks, captured or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.objectives.sft import sft
from tests.gpu.test_fuse_gpu import FAMILIES, batches, build, distance, gradients, in_float32
from tests.model.test_dropout import drawn, put_known_masks, seeded

pytestmark = pytest.mark.gpu

RATE, SEED = 0.1, 3
POLICIES = ("none", "mlp", "full", "offload", "full_offload")


def errors(family: str, layout: str, rank: int, **options: object) -> tuple[float, list[float]]:
    """Distance of gradients to float32's with the same masks: the reference's, the fast path's by policy."""
    model, batch = build(family, rank=rank, dropout=RATE), batches()[layout].to("cuda")
    forwards = [fuse(model, activations=policy, tokens_at_once=128, **options) for policy in POLICIES]
    assert not any(report.fallbacks for _, report in forwards)
    found = [gradients(model, seeded(forward, SEED), batch) for forward, _ in forwards]
    put_known_masks(model, forwards[0][0], drawn(SEED).to("cuda"))
    exact = in_float32(model)
    truth_loss, truth = gradients(exact, ReferenceForward(exact), batch)
    _, undropped = gradients(exact.eval(), ReferenceForward(exact), batch)
    assert distance(undropped, truth) > 0.1  # the masks do something
    assert all(abs(float(loss - truth_loss)) < 1e-2 * float(truth_loss) for loss, _ in found)
    _, plain = gradients(model, ReferenceForward(model), batch)
    return distance(plain, truth), [distance(grads, truth) for _, grads in found]


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_to_float32_is_no_larger_than_the_references(family: str, layout: str) -> None:
    reference, fast = errors(family, layout, rank=8)
    assert max(fast) <= 1.1 * reference + 1e-3, (reference, fast)


@pytest.mark.parametrize("rank", [4, 64, 256])
def test_error_to_float32_at_other_ranks(rank: int) -> None:
    reference, fast = errors("llama", "dense", rank)
    assert max(fast) <= 1.1 * reference + 1e-3, (reference, fast)


def test_fp8_products_are_close() -> None:
    assert max(errors("llama", "dense", 8, base_gemm="fp8")[1]) < 0.2


@pytest.mark.parametrize("policy", ["none", "full", "offload"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_captured_micro_step_repeats_the_eager_one_and_draws_new_masks(layout: str, policy: str) -> None:
    model, batch = build("llama", dropout=RATE), batches()[layout]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    step = GraphedMicroStep(fuse(model, activations=policy)[0], sft, parameters)
    step.scale.fill_(0.01)

    def once(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        for p in parameters:
            p.main_grad.zero_()
        return step(batch), [p.main_grad.clone() for p in parameters]

    seen = [once(seed) for seed in (1, 1, 1, 2, 1)]  # eager, captured, replayed three times
    for loss, grads in (seen[1], seen[2], seen[4]):
        assert torch.equal(loss, seen[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, seen[0][1], strict=True))
    other_loss, other = seen[3]
    assert not torch.equal(other_loss, seen[0][0])
    assert not any(torch.equal(a, b) for a, b in zip(other, seen[0][1], strict=True))
