"""A random base is what a loaded one is, in every byte but the values."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.synthetic import random_base
from tests import tiny


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
    weight = base.model.layers[0].self_attn.q_proj.weight
    values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert values.std() == pytest.approx(64**-0.5, rel=0.1)
