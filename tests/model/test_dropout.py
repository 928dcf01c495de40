"""LoRA dropout on the fast path is the reference's with the same masks, and off where the reference's is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import Batch
from qlora_trainer.kernels import Dropout
from qlora_trainer.kernels.reference import kept
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.objectives.sft import sft
from tests.model.test_fuse import FAMILIES, POLICIES, assert_equal, batch, build, reference, run

RATE = 0.1
TARGETS = [None, ["v_proj", "up_proj"], ["q_proj", "v_proj", "down_proj", "o_proj"]]


class KnownMask(nn.Module):
    """In place of an adapter's `nn.Dropout`: its mask of (seed, adapter, row, column) as kernels make it."""

    def __init__(self, dropout: Dropout, adapter: int) -> None:
        super().__init__()
        self.dropout, self.adapter = dropout, adapter

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seen = kept(self.dropout, self.adapter, x.shape[:-1].numel(), x.shape[-1])
        return x * seen.view(x.shape) / (1 - self.dropout.rate)


def put_known_masks(model: nn.Module, forward: FusedForward, seed: Tensor) -> None:
    """Replaces the model's dropout modules by ones that apply the masks that `forward` makes from `seed`."""
    for layer, module in zip(forward.layers, model.get_base_model().model.layers, strict=True):
        for group in layer.projections:
            for i, (member, _, _) in enumerate(group._adapters):
                parent = module.mlp if hasattr(module.mlp, member.name) else module.self_attn
                dropouts = getattr(parent, member.name).lora_dropout
                dropouts["default"] = KnownMask(group.dropout(seed), i)


def with_known_masks(model: nn.Module, forward: FusedForward, seed: Tensor) -> ReferenceForward:
    put_known_masks(model, forward, seed)
    return reference(model)


def drawn(seed: int) -> Tensor:
    """What the next micro-batch draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, ())


def seeded(forward: FusedForward, seed: int):
    def run_it(data: Batch) -> Tensor:
        torch.manual_seed(seed)
        return forward(data)

    return run_it


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_references_with_the_same_masks(family: str, kind: str) -> None:
    model = build(family, lora_dropout=RATE)
    forwards = []
    for policy in POLICIES:
        forward, report = fuse(model, activations=policy, tokens_at_once=16, logits_bytes=1 << 14)
        assert not report.fallbacks and report.fused
        forwards.append(forward)
    expected = run(model, with_known_masks(model, forwards[0], drawn(3)), batch(kind))
    _, undropped = run(model.eval(), reference(model), batch(kind))
    assert all((expected[1][n] - undropped[n]).norm() > 0.1 * undropped[n].norm() for n in undropped)
    model.train()
    for forward in forwards:
        assert_equal(run(model, seeded(forward, 3), batch(kind)), expected)


@pytest.mark.parametrize("targets", TARGETS)
def test_any_subset_of_adapters_on_a_quantized_base(targets: list[str] | None) -> None:
    lora = {} if targets is None else {"target_modules": targets}
    model = build("qwen2", "nf4", lora_dropout=RATE, r=5, **lora)
    forward, _ = fuse(model, resident_bytes=0)
    expected = run(model, with_known_masks(model, forward, drawn(0)), batch("dense"))
    assert_equal(run(model, seeded(forward, 0), batch("dense")), expected)


def test_evaluation_drops_nothing_and_draws_nothing() -> None:
    model = build("llama", lora_dropout=RATE).eval()
    forward, _ = fuse(model)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert_equal(run(model, forward, batch("packed")), run(model, reference(model), batch("packed")))
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    with torch.no_grad():  # training mode is what counts, as for PEFT's modules
        assert abs(sft(forward(batch("packed"))) - sft(forward(batch("packed")))) > 1e-4
    assert not torch.equal(torch.get_rng_state(), before)


def test_without_dropout_nothing_is_drawn() -> None:
    model = build("llama")
    forward, _ = fuse(model)
    before = torch.get_rng_state()
    assert forward.prepare(batch("dense")).seed is None
    run(model, forward, batch("dense"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_micro_batch_draws_its_masks_from_the_generator_that_checkpoints_hold() -> None:
    model = build("llama", lora_dropout=RATE)
    step = GraphedMicroStep(fuse(model)[0], sft, [])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = step(batch("dense")), step(batch("dense"))
    assert first != second
    torch.set_rng_state(state)
    assert torch.equal(step(batch("dense")), first) and torch.equal(step(batch("dense")), second)


def test_no_two_adapters_share_their_masks() -> None:
    forward, _ = fuse(build("llama", lora_dropout=RATE))
    groups = [group for layer in forward.layers for group in layer.projections]
    numbers = [group.first_adapter + i for group in groups for i in range(len(group.ranks))]
    assert sorted(numbers) == list(range(14))


@pytest.mark.parametrize("odd", [nn.Dropout(0.5), nn.AlphaDropout(RATE)])
def test_groups_of_unlike_dropout_run_as_the_reference(odd: nn.Module) -> None:
    model = build("llama", lora_dropout=RATE)
    model.get_base_model().model.layers[0].self_attn.k_proj.lora_dropout["default"] = odd
    _, report = fuse(model)
    assert set(report.fallbacks) == {"layers.0"} and "lora_dropout" in report.fallbacks["layers.0"]


def test_fp8_products_see_the_same_masks() -> None:
    model = build("llama", "nf4", lora_dropout=RATE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.2)  # to the size that adapters have beside such weights
    forward, _ = fuse(model, base_gemm="fp8")
    loss, found = run(model, seeded(forward, 1), batch("dense"))
    exact_loss, exact = run(model, with_known_masks(model, forward, drawn(1)), batch("dense"))
    assert abs(loss - exact_loss) < 0.02 * exact_loss
    error = sum((found[n] - exact[n]).pow(2).sum() for n in exact)
    error = error / sum(g.pow(2).sum() for g in exact.values())
    assert 1e-4 < error**0.5 < 0.15
