"""Predicted bytes are the real bytes of small models and of the optimizer."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.optim import pages
from qlora_trainer.optim.adamw import AdamW
from qlora_trainer.plan import hardware, memory
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.plan import make_plan
from tests import tiny
from tests.plan.sizes import LLAMA3_8B, llama3_8b_shape, settings, shape_in


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "opt", "phi3"])
def test_base_takes_the_bytes_of_the_quantized_model(tmp_path, architecture: str, double_quant: bool) -> None:
    tiny.model(architecture).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
        ),
    )
    weights = constants = other = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, bnb.nn.Linear4bit) and parameter is module.weight:
                state = parameter.quant_state
                weights += parameter.nbytes
                parts = [state.absmax, state.code]
                if double_quant:
                    parts += [state.state2.absmax, state.state2.code, state.offset]
                constants += sum(-(-part.nbytes // 512) * 512 for part in parts)
    other = sum({id(p): p.nbytes for p in model.parameters() if p.dtype != torch.uint8}.values())
    base = memory.fixed(shape_in(tmp_path), settings(double_quant=double_quant))
    assert weights > 0
    assert (base.base_weights, base.quantization_constants, base.embeddings_and_head) == (
        weights,
        constants,
        other,
    )


def test_double_quantization_costs_0_127_bit() -> None:
    shape = llama3_8b_shape()
    base = memory.fixed(shape, settings())
    parameters = sum(linear.numel for linear in shape.linears)
    assert 8 * base.quantization_constants / parameters == pytest.approx(0.127, abs=0.003)
    assert memory.fixed(shape, settings(double_quant=False)).quantization_constants == pytest.approx(
        0.5 / 8 * parameters, rel=1e-3
    )


@pytest.mark.parametrize("state_bits", [32, 8])
def test_optimizer_takes_the_bytes_of_the_real_one(state_bits: int) -> None:
    optimizer = AdamW([("w", nn.Parameter(torch.zeros(3, 4096)))], state_bits=state_bits)
    assert optimizer.pages.nbytes()["device"] == memory.state_bytes(3 * 4096, state_bits)
    assert (memory.PAGE_ELEMENTS, memory.SLOTS) == (pages.PAGE_ELEMENTS, pages.SLOTS)


def test_parts_add_up_and_depend_on_what_they_should() -> None:
    def step(policy: str = "none", **changes: object) -> memory.Phase:
        wanted, shape = settings(**changes), llama3_8b_shape(method=changes.get("method", "nf4"))
        base = memory.fixed(shape, wanted)
        return memory.step_phase(memory.path_of(shape, wanted), wanted, base, [policy] * 32, 0)

    whole = step()
    assert whole.total == sum(whole.parts.values()) == whole.allocated + whole.parts["context"]
    assert step("mlp").total < whole.total and step("full").total < step("mlp").total
    assert step(rows=8).parts["activations"] == pytest.approx(2 * whole.parts["activations"], rel=0.05)
    assert step(r=64).parts["gradients"] == 4 * whole.parts["gradients"]
    assert step(fast=False).total > whole.total
    assert step(supervised=0.1).total < whole.total
    cpu = {method: memory.context(settings(device="cpu", method=method)) for method in ("nf4", "gptq", "awq")}
    assert cpu["gptq"] == cpu["awq"] == cpu["nf4"] + memory.GPTQMODEL
    assert memory.context(settings(method="gptq")) == whole.parts["context"]
    assert step(method="none").parts["base weights"] == 4 * whole.parts["base weights"]


def test_a_tokenizer_takes_its_share_of_ram() -> None:
    """Measured on byte-pair tokenizers of 32,000 to 262,000 tokens: 1,250 to 1,400 bytes for each."""
    small, large = (memory.context(settings(device="cpu", vocabulary=n)) for n in (32_000, 262_144))
    assert large - small == pytest.approx(230_144 * 1350, rel=0.05)
    assert memory.context(settings(vocabulary=262_144)) == memory.CONTEXT["cuda"]  # that is the device's
    plans = [
        make_plan(RunConfig(), hardware.parse("H100"), Architecture(LLAMA3_8B | {"vocab_size": n}))
        for n in (32_000, 262_144)
    ]
    assert plans[1].host["process"] - plans[0].host["process"] == large - small
