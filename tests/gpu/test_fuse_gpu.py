"""The fast path on a GPU: as close to float32 as the reference is, for every policy and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import Batch
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from tests.batches import collate, documents

pytestmark = pytest.mark.gpu

BASE = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=1000, max_position_embeddings=1024,
)  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama": dict(BASE, head_dim=128, num_attention_heads=4, num_key_value_heads=1),
    "mistral": dict(BASE, sliding_window=40),
    "qwen2": BASE,
    "qwen3": dict(BASE, head_dim=64),
    "gemma": dict(BASE, head_dim=256, num_attention_heads=2, num_key_value_heads=1),
    "gemma3_text": dict(BASE, head_dim=64, sliding_window=40, query_pre_attn_scalar=64),
    "phi3": dict(BASE, pad_token_id=0),
}


def build(family: str, quantization: str = "nf4", rank: int = 8, dropout: float = 0.0) -> nn.Module:
    from transformers import CONFIG_MAPPING

    from qlora_trainer.model.synthetic import random_base

    config = CONFIG_MAPPING[family](**FAMILIES[family])
    base = random_base(config, torch.device("cuda"), method=quantization)
    options = LoraOptions(r=rank, lora_alpha=2 * rank, lora_dropout=dropout)
    model = attach(base, options, seed=0).train()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.02)
    return model


def in_float32(model: nn.Module) -> nn.Module:
    """The same function with every weight in float32 (4-bit ones dequantized)."""
    import bitsandbytes as bnb

    exact = copy.deepcopy(model)
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                linear = nn.Linear(
                    child.in_features, child.out_features, bias=child.bias is not None, device="meta"
                )
                value = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                linear.weight = nn.Parameter(value.float(), requires_grad=False)
                linear.bias = child.bias
                setattr(module, name, linear)
    return exact.float()


def gradients(model: nn.Module, forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = sft(forward(batch))
    loss.backward()
    found = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    error = sum((found[n] - exact[n]).double().pow(2).sum() for n in exact)
    return float((error / sum(g.double().pow(2).sum() for g in exact.values())).sqrt())


def batches() -> dict[str, Batch]:
    dense = collate([[d] for d in documents([200, 137, 190], vocab=900)])
    packed = collate([documents([50, 80, 41], vocab=900), documents([90, 33], vocab=900, seed=3)])
    return {"dense": dense, "packed": packed}


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_to_float32_is_no_larger_than_the_references(family: str, layout: str) -> None:
    model = build(family)
    exact = in_float32(model)
    batch = batches()[layout].to("cuda")
    truth_loss, truth = gradients(exact, ReferenceForward(exact), batch)
    _, plain = gradients(model, ReferenceForward(model), batch)
    reference = distance(plain, truth)
    for policy in ("none", "mlp", "full", "offload", "full_offload"):
        forward, report = fuse(model, activations=policy, tokens_at_once=128)
        assert not report.fallbacks
        loss, found = gradients(model, forward, batch)
        assert distance(found, truth) <= 1.1 * reference + 1e-3, (policy, distance(found, truth), reference)
        assert abs(float(loss - truth_loss)) < 1e-2 * float(truth_loss)


@pytest.mark.parametrize("rank", [4, 64, 256])
def test_error_to_float32_at_other_ranks(rank: int) -> None:
    model = build("llama", rank=rank)
    exact = in_float32(model)
    batch = batches()["dense"].to("cuda")
    _, truth = gradients(exact, ReferenceForward(exact), batch)
    _, plain = gradients(model, ReferenceForward(model), batch)
    _, found = gradients(model, fuse(model)[0], batch)
    assert distance(found, truth) <= 1.1 * distance(plain, truth) + 1e-3


def test_fp8_products_are_close() -> None:
    model = build("llama")
    exact = in_float32(model)
    batch = batches()["dense"].to("cuda")
    truth_loss, truth = gradients(exact, ReferenceForward(exact), batch)
    loss, found = gradients(model, fuse(model, base_gemm="fp8")[0], batch)
    assert abs(float(loss - truth_loss)) < 1e-2 * float(truth_loss)
    assert distance(found, truth) < 0.2  # 0.17 by the plain-torch kernels on a CPU


def test_resident_copies_change_nothing() -> None:
    model, batch = build("llama"), batches()["dense"]
    shared, _ = fuse(model)
    resident, report = fuse(model, resident_bytes=1 << 30)
    assert report.resident_bytes > 0
    loss, found = gradients(model, shared, batch)
    other_loss, other = gradients(model, resident, batch)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(found[n], other[n]) for n in found)


@pytest.mark.parametrize(("policy", "on_host"), [("mlp", "offload"), ("full", "full_offload")])
def test_what_waits_on_the_host_comes_back_as_it_was(policy: str, on_host: str) -> None:
    """Row by row in other lengths too, whose copies go through the same pinned memory; and in mixes."""
    model = build("llama")
    plain, _ = fuse(model, activations=policy)
    for policies in ([on_host, on_host], [on_host, policy], [policy, on_host]):
        away, _ = fuse(model, activations=policies)
        for lengths in ([200, 137, 190], [40, 31], [300, 260, 1]):
            batch = collate([[d] for d in documents(lengths, vocab=900)])
            loss, expected = gradients(model, plain, batch)
            other, found = gradients(model, away, batch)
            assert torch.equal(loss, other)
            assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_captured_steps_of_several_lengths_share_pinned_memory() -> None:
    """The longer one comes second: what the first captured must stay where it was."""
    model = build("llama")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    step = GraphedMicroStep(fuse(model, activations="full_offload")[0], sft, parameters)
    step.scale.fill_(0.01)
    short, long = (collate([[d] for d in documents(n, vocab=900)]) for n in ([60, 40], [200, 137, 190]))
    seen: dict[int, list[Tensor]] = {}
    for batch in (short, short, long, long, short, long, short):
        for p in parameters:
            p.main_grad.zero_()
        found = [step(batch).clone(), *(p.main_grad.clone() for p in parameters)]
        expected = seen.setdefault(batch.input_ids.numel(), found)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("policy", ["none", "offload", "full_offload"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_captured_micro_step_repeats_the_eager_one(layout: str, policy: str) -> None:
    model, batch = build("llama"), batches()[layout]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    forward, _ = fuse(model, activations=policy)
    step = GraphedMicroStep(forward, sft, parameters)
    step.scale.fill_(0.01)
    seen = []
    for _ in range(4):  # eager, captured, replayed twice
        for p in parameters:
            p.main_grad.zero_()
        loss = step(batch)
        seen.append((loss.clone(), [p.main_grad.clone() for p in parameters]))
    for loss, grads in seen[1:]:
        assert torch.equal(loss, seen[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, seen[0][1], strict=True))
    assert all(p.grad is None for p in parameters)


def test_captured_steps_of_rounded_shapes_are_the_plain_ones() -> None:
    """Many lengths, few graphs: in bfloat16 a wider row only sums in another order."""
    model = build("llama")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    forward, _ = fuse(model)
    step = GraphedMicroStep(forward, sft, parameters, longest=256, max_graphs=6)
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        lengths = torch.randint(30, 257, (2,), generator=generator).tolist()
        batch = collate([[d] for d in documents(lengths, vocab=900, seed=i)])
        for p in parameters:
            p.main_grad.zero_()
        loss, found = step(batch), [p.main_grad.clone() for p in parameters]
        for p in parameters:
            p.main_grad.zero_()
        plain = sft(forward(batch))
        plain.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
        for a, p in zip(found, parameters, strict=True):
            assert (a - p.main_grad).norm() <= 0.03 * p.main_grad.norm()
    assert 0 < len(step._graphs.kept) <= 6
