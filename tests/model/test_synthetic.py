"""A random base is what a loaded one is, in every byte but the values."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from transformers import CONFIG_MAPPING

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.synthetic import random_base
from qlora_trainer.objectives.sft import sft
from tests import tiny
from tests.batches import collate, documents


def layout(model) -> dict[str, tuple]:
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            parts = {"absmax": state.absmax, "code": state.code}
            if state.nested:
                parts |= {"offset": state.offset, "absmax2": state.state2.absmax, "code2": state.state2.code}
            found[f"{name}.state"] = (state.blocksize, state.quant_type, tuple(state.shape), state.dtype)
            for key, part in parts.items():
                found[f"{name}.{key}"] = (part.dtype, part.numel())
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "opt", "phi3"])
@pytest.mark.parametrize(("method", "double_quant"), [("nf4", True), ("fp4", False), ("none", False)])
def test_random_base_has_the_layout_of_a_loaded_one(tmp_path, architecture, method, double_quant) -> None:
    folder = tiny.save(tmp_path, architecture)
    options = BaseOptions(str(folder), method=method, double_quant=double_quant)
    loaded = load_base(options, torch.device("cpu"))
    made = random_base(
        loaded.config, torch.device("cpu"), method=method, double_quant=double_quant, dtype=torch.float32
    )
    assert layout(made) == layout(loaded)
    assert not any(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3"])
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_the_fast_path_takes_it_and_agrees_with_the_reference(family: str, method: str) -> None:
    shape = CONFIG_MAPPING[family](**tiny.ARCHITECTURES.get(family, tiny.ARCHITECTURES["gemma2"]))
    base = random_base(shape, torch.device("cpu"), method=method, dtype=torch.float32)
    model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0)
    batch = collate([[document] for document in documents([20, 30])])
    forward, report = fuse(model)
    assert not report.fallbacks
    loss = sft(forward(batch)) / batch.n_supervised
    assert 3 < loss.item() < 9  # about log(263): random weights know nothing
    reference = sft(ReferenceForward(model)(batch)).item() / batch.n_supervised
    assert loss.item() == pytest.approx(reference, rel=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("architecture", "around"), [("llama", 1), ("gemma", 0)])
def test_norms_and_biases_are_neither_ones_nor_zeros(architecture: str, around: float) -> None:
    base = random_base(tiny.model(architecture).config, torch.device("cpu"), dtype=torch.float32)
    norm = base.model.layers[0].input_layernorm.weight
    assert norm.mean() == pytest.approx(around, abs=0.02) and 0.01 < norm.std() < 0.03
    for method in ("nf4", "none"):
        base = random_base(tiny.model("qwen2").config, torch.device("cpu"), method=method)
        assert 0.01 < base.model.layers[0].self_attn.q_proj.bias.float().std() < 0.03


def test_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        random_base(tiny.model("llama").config, torch.device("cpu"), method="int8")


def test_random_base_trains_and_repeats() -> None:
    config = tiny.model("llama").config
    losses = []
    for _ in range(2):
        base = random_base(config, torch.device("cpu"), dtype=torch.float32, seed=3)
        model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0)
        tokens = torch.arange(6, 70)[None]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert losses[0] == losses[1] and losses[0] == pytest.approx(5.57, abs=0.5)  # ln 263: knows nothing


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_weights_have_the_spread_that_keeps_deep_stacks_finite(method: str) -> None:
    base = random_base(tiny.model("llama").config, torch.device("cpu"), method=method)
    weight = base.model.layers[0].self_attn.q_proj.weight
    values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert values.std().item() == pytest.approx(64**-0.5, rel=0.1)
