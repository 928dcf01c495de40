"""The fast path equals the reference in float32, falls back where it must, and says so."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import Batch
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep, fuse
from qlora_trainer.model.load import keep_unpacked
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate, documents

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "head_dim": 16},
    "phi3": {},
}
POLICIES = ("none", "mlp", "full", "offload", "full_offload")
tiny.ARCHITECTURES.setdefault("gemma3_text", dict(tiny.GATED))


def quantize(model: nn.Module, quant_type: str, nested: bool) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None,
                    compute_dtype=torch.float32, compress_statistics=nested, quant_type=quant_type,
                )  # fmt: skip
                linear.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, compress_statistics=nested, quant_type=quant_type
                )
                linear.bias = child.bias
                keep_unpacked(linear)
                setattr(parent, name, linear.to("cpu"))
    return model


def build(
    family: str = "llama", quantization: str | None = None, nested: bool = True, **lora: object
) -> nn.Module:
    base = tiny.model(family, intermediate_size=128, **FAMILIES[family]).requires_grad_(False)
    if quantization is not None:
        quantize(base, quantization, nested)
    options = {"r": 4, "lora_alpha": 8, "dtype": torch.float32} | lora
    model = attach(base, LoraOptions(**options), seed=0).train()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.1)
    return model


def batch(kind: str) -> Batch:
    if kind == "dense":
        return collate([[d] for d in documents([13, 9, 17])], supervised_from=3)
    return collate([documents([5, 8, 4]), documents([9, 3], seed=3)])


def reference(model: nn.Module) -> ReferenceForward:
    forward = ReferenceForward(model)
    forward._explicit_mask = False  # these families isolate by position ids
    return forward


def run(model: nn.Module, forward, data: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = sft(forward(data))
    (loss * 0.1).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    scale = max(g.norm() for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_references(family: str, kind: str) -> None:
    model = build(family)
    expected = run(model, reference(model), batch(kind))
    for policy in POLICIES:
        forward, report = fuse(model, activations=policy, tokens_at_once=16, logits_bytes=1 << 14)
        assert not report.fallbacks and report.fused
        assert_equal(run(model, forward, batch(kind)), expected)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_four_bit_bases_of_either_kind(quantization: str, nested: bool) -> None:
    model = build("qwen2", quantization, nested)
    expected = run(model, reference(model), batch("dense"))
    for resident in (None, 0):  # resident copies, or dequantized again for every product
        forward, report = fuse(model, resident_bytes=resident)
        assert (report.resident_bytes > 0) == (resident is None)
        assert_equal(run(model, forward, batch("dense")), expected)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["v_proj", "up_proj"], "r": 5},
        {"target_modules": ["o_proj", "down_proj", "gate_proj"], "use_rslora": True},
    ],
)
def test_any_subset_of_adapters(lora: dict) -> None:
    model = build("llama", **lora)
    expected = run(model, reference(model), batch("dense"))
    for policy in POLICIES:
        assert_equal(run(model, fuse(model, activations=policy)[0], batch("dense")), expected)


def test_policies_may_differ_by_layer() -> None:
    model = build("llama")
    expected = run(model, reference(model), batch("packed"))
    forward, report = fuse(model, activations=["full", "mlp"])
    assert report.activations == ["full", "mlp"]
    assert_equal(run(model, forward, batch("packed")), expected)


def test_gradients_accumulate_in_main_grad() -> None:
    model = build("llama")
    _, expected = run(model, reference(model), batch("dense"))
    forward, _ = fuse(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter)
    for _ in range(2):
        (sft(forward(batch("dense"))) * 0.1).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is None
            assert (parameter.main_grad - 2 * expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6


def test_adapters_updated_in_place_are_seen() -> None:
    model = build("llama")
    forward, _ = fuse(model)
    before = sft(forward(batch("dense"))).detach()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    expected = run(model, reference(model), batch("dense"))
    found = run(model, forward, batch("dense"))
    assert_equal(found, expected)
    assert abs(found[0] - before) > 1e-4


def test_evaluation_without_gradients() -> None:
    model = build("llama")
    with torch.no_grad():
        expected = sft(reference(model)(batch("packed")))
        for policy in POLICIES:
            loss = sft(fuse(model, activations=policy)[0](batch("packed")))
            assert not loss.requires_grad
            assert abs(loss - expected) <= 1e-5 * expected


@pytest.mark.parametrize("base_gemm", ["bf16", "fp8"])
def test_the_base_alone_is_the_model_before_adapters(base_gemm: str) -> None:
    model = build("llama")
    plain, _ = fuse(model, base_gemm=base_gemm)
    tuned = sft(plain(batch("packed")))
    alone = plain(batch("packed"), adapters=False)
    assert not alone.nll.requires_grad
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    expected = plain(batch("packed")).nll.detach()
    assert torch.allclose(alone.nll, expected, rtol=1e-5, atol=1e-6)
    assert abs(sft(alone) - tuned) > 1e-3


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_base_alone_is_the_references(family: str, saved: list[str] | None) -> None:
    model = build(family, modules_to_save=saved) if saved else build(family, "nf4")
    expected = reference(model)(batch("packed"), adapters=False)
    found = fuse(model)[0](batch("packed"), adapters=False)
    assert abs(sft(found) - sft(expected)) <= 1e-5 * sft(expected)
    assert abs(sft(fuse(model)[0](batch("packed"))) - sft(expected)) > 1e-3


def test_a_batch_without_labels_has_zero_loss() -> None:
    model = build("llama")
    data = collate([[d] for d in documents([6, 4])], supervised_from=6)
    loss, found = run(model, fuse(model)[0], data)
    assert loss == 0
    assert all((g == 0).all() for g in found.values())


@pytest.mark.parametrize(
    ("family", "lora", "reason"),
    [
        ("llama", {"use_dora": True}, "DoRA"),
        ("gemma2", {}, "soft-capping"),
    ],
)
def test_what_cannot_be_fused_runs_as_the_reference(family: str, lora: dict, reason: str) -> None:
    kept = FAMILIES["gemma2"].copy()
    if family == "gemma2":
        FAMILIES["gemma2"] = {}
    model = build(family, **lora)
    FAMILIES["gemma2"] = kept
    forward, report = fuse(model, activations="full")
    assert set(report.fallbacks) == {"layers.0", "layers.1"}
    assert all(reason in line for line in report.fallbacks.values())
    for kind in ("dense", "packed"):
        assert_equal(run(model, forward, batch(kind)), run(model, reference(model), batch(kind)))


def test_one_unfused_layer_among_fused_ones() -> None:
    model = build("llama")
    layers = model.get_base_model().model.layers
    layers[0].self_attn.o_proj.lora_dropout["default"] = nn.AlphaDropout(0.5)
    model.eval()
    forward, report = fuse(model)
    assert set(report.fallbacks) == {"layers.0"}
    assert_equal(run(model, forward, batch("packed")), run(model, reference(model), batch("packed")))


def test_a_trained_head_runs_as_it_is() -> None:
    model = build("llama", modules_to_save=["lm_head"])
    forward, report = fuse(model)
    assert set(report.fallbacks) == {"lm_head"}
    assert_equal(run(model, forward, batch("dense")), run(model, reference(model), batch("dense")))


def test_unknown_families_are_left_to_the_reference() -> None:
    base = tiny.model("opt").requires_grad_(False)
    model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0)
    forward, report = fuse(model)
    assert isinstance(forward, ReferenceForward)
    assert not report.fused and "opt" in report.modules["model"]


def test_fp8_products_stay_within_their_rounding() -> None:
    model = build("llama", "nf4")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.2)  # to the size that adapters have beside such weights
    exact_loss, exact = run(model, reference(model), batch("dense"))
    forward, report = fuse(model, base_gemm="fp8")
    assert report.resident_bytes > 0
    loss, found = run(model, forward, batch("dense"))
    assert abs(loss - exact_loss) < 0.02 * exact_loss
    error = sum((found[n] - exact[n]).pow(2).sum() for n in exact)
    error = error / sum(g.pow(2).sum() for g in exact.values())
    assert 1e-4 < error**0.5 < 0.15  # it is fp8, and it is close


def test_without_a_gpu_nothing_leaves_for_the_host_and_the_report_says_so() -> None:
    model = build("llama")
    for policy in ("offload", "full_offload"):
        _, report = fuse(model, activations=policy)
        assert report.activations == [policy] * 2
        assert report.modules["layers.0"] == f"fused, activations {policy} (kept where they are: no GPU)"


def test_the_report_is_short() -> None:
    lines = fuse(build("llama"))[1].lines()
    assert lines[1].startswith("layers.0 … layers.1: fused")
    assert len(lines) == 3


def test_bad_arguments_are_refused() -> None:
    model = build("llama")
    for arguments in ({"activations": "some"}, {"activations": ["none"]}, {"base_gemm": "int4"}):
        with pytest.raises(ConfigError):
            fuse(model, **arguments)


def test_a_micro_step_on_the_cpu_is_the_plain_one() -> None:
    model = build("llama")
    _, expected = run(model, reference(model), batch("dense"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.main_grad = torch.zeros_like(p)
    step = GraphedMicroStep(fuse(model)[0], sft, parameters)
    step.scale.fill_(0.1)
    step(batch("dense"))
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.main_grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-6


def test_rotary_kinds_that_look_at_values_are_not_captured() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = tiny.model("llama", intermediate_size=128, rope_parameters=rope).requires_grad_(False)
    model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0)
    forward, report = fuse(model)
    assert report.fused and not forward.capturable
    assert_equal(run(model, forward, batch("dense")), run(model, reference(model), batch("dense")))
    assert fuse(build("llama"))[0].capturable
