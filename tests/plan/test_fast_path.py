"""The formulas of the fast path are the bytes that its tensors take on a CPU, kept, copied or borrowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_trainer.config import checks
from qlora_trainer.errors import ConfigError
from qlora_trainer.kernels import why_plain
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.fused.adapter_columns import Widened
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.model.fused.layer import LayerSaved
from qlora_trainer.model.fused.projection_fp8 import Fp8Projection
from qlora_trainer.objectives.sft import sft
from qlora_trainer.plan import hardware, memory
from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.plan import make_plan
from tests import tiny
from tests.model.test_fuse import batch, build
from tests.plan.sizes import llama3_8b, llama3_8b_shape, settings, shape_of
from tests.plan.test_plan import config, plan

FP8 = ("train.base_gemm", "fp8")


def fused(family: str, r: int, **options: object) -> tuple[FusedForward, FastPath]:
    """A tiny NF4 model's forward, and the formulas for it and for `batch("dense")`, three rows of 17."""
    forward, report = fuse(build(family, "nf4", r=r), **options)
    assert isinstance(forward, FusedForward) and not report.fallbacks
    changes = {"head_dim": 16, "query_pre_attn_scalar": 16} if family == "gemma3_text" else {}
    shape = shape_of(tiny.model(family, intermediate_size=128, **changes).config.to_dict())
    rows, length = batch("dense").input_ids.shape
    wanted = settings(
        device="cpu", dtype_bytes=4, adapter_bytes=4, r=r, rows=rows, length=length,
        fp8=options.get("base_gemm") == "fp8",
    )  # fmt: skip
    return forward, FastPath(shape, wanted)


def projections(forward: FusedForward) -> list[Fp8Projection]:
    return [projection for layer in forward.layers for projection in layer.projections]


def saved_bytes(forward: FusedForward, policy: str) -> int:
    """Storage that the layers' nodes of autograd hold on to, the weights' not counted."""
    nodes, seen, storages = [sft(forward(batch("dense"))).grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        blocks = node.saved.blocks if isinstance(getattr(node, "saved", None), LayerSaved) else ()
        for value in (value for block in blocks for value in vars(block).values()):
            value = value.buffer if isinstance(value, Widened) else value
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("base_gemm", ["bf16", "fp8"])
@pytest.mark.parametrize("policy", ["none", "mlp", "full", "offload", "full_offload"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_layers_keep_what_the_formula_says(family: str, policy: str, base_gemm: str) -> None:
    forward, path = fused(family, 8, activations=policy, base_gemm=base_gemm)
    assert saved_bytes(forward, policy) == pytest.approx(len(forward.layers) * path.kept(policy), rel=0.002)


@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_e4m3_copies_take_the_bytes_of_the_real_ones(family: str, r: int) -> None:
    forward, path = fused(family, r, base_gemm="fp8")
    sft(forward(batch("dense"))).backward()
    held = [
        value for projection in projections(forward) for value in vars(projection).values()
        if isinstance(value, torch.Tensor)
    ]  # fmt: skip
    assert {tensor.dtype for tensor in held} == {torch.float8_e4m3fn, torch.float32}
    assert path.e4m3() == sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert path.workspace() == sum(buffer.nbytes for buffer in forward.workspace._buffers.values()) == 0


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_dequantized_weights_and_workspace_take_the_bytes_of_the_real_ones(family: str) -> None:
    forward, path = fused(family, 8)
    sft(forward(batch("dense"))).backward()
    assert path.dequantized() == sum(p._resident.nbytes for p in projections(forward))
    assert path.workspace(path.dequantized()) == len(forward.workspace._buffers) == 0
    forward, path = fused(family, 8, resident_bytes=0)
    sft(forward(batch("dense"))).backward()
    assert path.workspace() == sum(buffer.nbytes for buffer in forward.workspace._buffers.values())
    assert path.workspace() == forward.workspace.nbytes


def test_fp8_is_planned_with_its_copies_and_without_what_it_does_not_need() -> None:
    wanted = settings(fp8=True)
    base, path = memory.fixed(llama3_8b_shape(), wanted), memory.path_of(llama3_8b_shape(), wanted)
    assert base.e4m3_copies == pytest.approx(2 * 6.98e9, rel=0.04)  # two orientations, a byte each
    step = memory.step_phase(path, wanted, base, ["none"] * 32, 0)
    assert step.parts["e4m3 copies"] == base.e4m3_copies and step.parts["dequantized weights"] == 0
    found, plain = plan("H100", FP8), plan("H100")
    assert found.dequantized == 0 < plain.dequantized
    assert found.tokens_per_second > 1.25 * plain.tokens_per_second
    assert plan("24GiB", FP8).phases[0].parts["e4m3 copies"] == 0  # made once everything is loaded


def test_fp8_that_does_not_fit_is_told_to_do_without() -> None:
    found = plan("16GiB", FP8)
    assert not found.fits
    (change,) = [change for change in found.changes if change.overrides == "train.base_gemm=bf16"]
    assert change.fits and change.peak == plan("16GiB").peak.total


def test_fp8_is_refused_before_loading_where_no_unit_computes_it() -> None:
    with pytest.raises(ConfigError, match=r"A100.*base_gemm=bf16"):
        plan("A100", FP8)
    assert plan("RTX 4090", FP8, ("train.max_length", 512)).fits
    reference = make_plan(config(FP8, ("lora.use_dora", True)), hardware.parse("H100"), llama3_8b())
    assert reference.peak.parts["e4m3 copies"] == 0  # the reference multiplies in bfloat16


def test_dropout_stays_on_the_fast_path_and_costs_a_little_time() -> None:
    for keys in ((), (FP8,)):
        found, without = plan("H100", ("lora.lora_dropout", 0.05), *keys), plan("H100", *keys)
        assert found.reference_because is None and found.peak == without.peak
        assert 0.9 < found.tokens_per_second / without.tokens_per_second < 1
    some = llama3_8b_shape(target_modules=["q_proj", "v_proj"])
    assert (
        FastPath(some, settings(dropout=True)).dropout_traffic() == 2 * 2 * 4096
    )  # their one input, read and written


def test_cards_without_bfloat16_compute_in_float32() -> None:
    activations = [
        plan(gpu, ("train.activations", "full")).phases[1].parts["activations"] for gpu in ("T4", "L4")
    ]
    assert activations[0] > 1.8 * activations[1]


def test_the_kernels_are_those_that_the_run_would_pick_there() -> None:
    found, recent = plan("T4"), plan("L4")
    assert found.plain_kernels_because == why_plain("cuda", (7, 5), True) != why_plain("cuda", (7, 5), False)
    assert "compute capability 7.5 has no bfloat16" in " ".join(found.notes) and found.margin == 0.2
    assert recent.plain_kernels_because is None and recent.margin == 0.05
    here = replace(hardware.parse("L4"), triton=False)
    assert "`triton` is not installed" in str(make_plan(config(), here, llama3_8b()).plain_kernels_because)
    assert plan("T4", ("lora.use_dora", True)).plain_kernels_because is None  # the reference has none


def test_streamed_layers_and_resident_e4m3_exclude_each_other() -> None:
    (problem,) = checks.values(config(FP8, ("model.offload", "layers")))
    assert "train.base_gemm=fp8" in problem
    assert plan("16GiB", FP8, ("model.offload", "auto")).offload != "layers"
