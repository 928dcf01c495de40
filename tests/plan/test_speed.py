"""The planned speed is that of the machine: cells of `scripts/plan_grid` as they ran on one H100 80GB."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_trainer.data.batch import Batch
from qlora_trainer.model.fused import inputs
from qlora_trainer.plan import hardware, speed
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.choose import graph_memory
from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.plan import RunPlan, make_plan
from qlora_trainer.plan.settings import DataFacts
from qlora_trainer.plan.settings import from_config as from_run_config
from tests.plan.sizes import LLAMA3_8B, shape_of
from tests.plan.test_plan import config

LLAMA2_7B = LLAMA3_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
LLAMA2_13B = LLAMA2_7B | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
LLAMA3_70B = LLAMA3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
REFERENCE, DROPOUT = ("model.kernels", "reference"), ("lora.lora_dropout", 0.1)


def plan(shape: dict[str, object], r: int, rows: int, length: int, policy: str, *keys: tuple) -> RunPlan:
    sizes = [("lora.r", r), ("train.per_device_train_batch_size", rows), ("train.max_length", length)]
    sizes += [("train.gradient_accumulation_steps", 1), ("train.activations", policy), *keys]
    card = replace(hardware.parse("H100"), host_memory=120 << 30)
    return make_plan(config(*sizes), card, Architecture(shape))


@pytest.mark.parametrize(
    ("asked", "tokens_per_second"),
    [
        ((LLAMA3_8B, 16, 4, 2048, "mlp"), 14_862),
        ((LLAMA3_8B, 16, 4, 2048, "full"), 13_388),
        ((LLAMA3_8B, 16, 4, 2048, "offload"), 14_460),
        ((LLAMA3_8B, 8, 1, 8192, "none"), 15_102),
        ((LLAMA2_7B, 64, 16, 512, "none"), 20_194),
        ((LLAMA2_7B, 64, 16, 208, "none"), 19_604),
        ((LLAMA2_7B, 64, 4, 208, "none"), 14_731),
        ((LLAMA2_7B, 64, 1, 208, "none"), 8_500),
        ((LLAMA2_7B, 64, 1, 208, "none", DROPOUT), 8_327),
        ((LLAMA2_7B, 16, 1, 208, "none"), 10_172),
        ((LLAMA3_8B, 16, 2, 512, "none"), 17_268),
        ((LLAMA3_8B, 16, 1, 2048, "none"), 17_230),
        ((LLAMA2_7B, 8, 1, 8192, "offload"), 12_921),
        ((LLAMA2_13B, 16, 4, 2048, "mlp"), 8_770),
        ((LLAMA3_70B, 16, 4, 2048, "full"), 1_674),
        ((LLAMA3_70B, 16, 4, 2048, "full", ("model.offload", "layers")), 1_658),
        ((LLAMA3_8B, 16, 4, 2048, "none"), 17_665),
        ((LLAMA3_8B, 16, 4, 2048, "none", ("train.base_gemm", "fp8")), 24_866),
        ((LLAMA3_70B, 16, 2, 2048, "full"), 1_637),
        ((LLAMA3_8B, 16, 4, 2048, "none", REFERENCE), 11_315),
        ((LLAMA3_8B, 16, 4, 2048, "full", REFERENCE), 8_031),
    ],
)
def test_planned_speed_is_the_measured_one(asked: tuple, tokens_per_second: float) -> None:
    assert plan(*asked).tokens_per_second == pytest.approx(tokens_per_second, rel=0.08)


def test_wide_models_reach_more_of_the_peak() -> None:
    """Products grow with the square of the width, what lies between them with the width."""
    narrow, wide = plan(LLAMA3_8B, 16, 4, 2048, "full"), plan(LLAMA3_70B, 16, 4, 2048, "full")
    reached = [p.flops_per_token * p.tokens_per_second for p in (narrow, wide)]
    assert 1.05 * reached[0] < reached[1] < 1.2 * reached[0]


def test_a_few_tokens_wait_for_the_weights() -> None:
    """13 GB of 16-bit weights, read by a forward and a backward pass, take 8 ms at 3.35 TB/s."""
    seconds = {n: plan(LLAMA2_7B, 16, 1, n, "none").seconds_per_step for n in (8, 64, 2048)}
    assert seconds[64] == pytest.approx(seconds[8], rel=0.1)
    assert seconds[8] > 2 * 2 * 6.48e9 / 3.35e12
    assert seconds[2048] > 4 * seconds[64]


def test_a_tiny_models_kernels_take_their_time() -> None:
    """The demo's 30 layers took 12 ms a micro-batch where its arithmetic takes one."""
    smollm2 = LLAMA3_8B | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }  # fmt: skip
    assert plan(smollm2, 16, 4, 82, "none").seconds_per_step == pytest.approx(0.012, rel=0.1)


def test_what_keeps_the_gpu_busy_runs_without_graphs() -> None:
    """4096 tokens of 7B: graphs, and the memory that they hold on to, would gain nothing."""
    captured = {rows: plan(LLAMA2_7B, 16, rows, 512, "none").graphs for rows in (1, 4, 8, 16)}
    assert captured == {1: True, 4: True, 8: True, 16: False}
    shape = shape_of(LLAMA2_7B)
    assert speed.busy_from(shape) == inputs.busy_tokens(202_375_168)


def test_graphs_hold_on_to_no_more_than_the_micro_batches_that_they_serve() -> None:
    """16 rows of 200 tokens are captured, those of 512 are not: 4447 of 8192 tokens' activations."""
    facts = DataFacts(documents=64, tokens=64 * 200, supervised=64 * 200, longest=512, lengths=(200,))
    card, shape = hardware.parse("H100"), shape_of(LLAMA2_7B)
    keys = [("train.per_device_train_batch_size", 16), ("train.max_length", 512)]
    asked = from_run_config(config(*keys), card, shape, facts)
    step = next(phase for phase in decide(shape, asked, card).phases if phase.name == "step")
    kept = step.parts["activations"] + step.parts["logits"]
    assert asked.tokens == 16 * 512
    assert graph_memory(shape, asked, step) == pytest.approx(kept * 4447 / 8192, rel=1e-3)
    full = from_run_config(config(*keys), card, shape)
    assert graph_memory(shape, full, step) == 0  # every row is full: none is captured


def test_rows_are_padded_as_much_as_planned_where_graphs_are_to_serve_them() -> None:
    buckets = inputs.Buckets(4096, 4096)
    widths = [
        inputs.pad_to_bucket(Batch(*[torch.zeros((1, n))] * 5, ()), buckets).input_ids.shape[1]
        for n in range(64, 513, 8)
    ]
    assert sum(widths) / sum(range(64, 513, 8)) == pytest.approx(speed.PADDED, abs=0.02)
