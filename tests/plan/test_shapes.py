"""Shapes and parameter counts are those of the real models."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.plan import shapes
from tests import tiny
from tests.plan.sizes import LLAMA3_8B, shape_in, shape_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_parameters_are_counted_once_each(architecture: str) -> None:
    model = tiny.model(architecture)
    shape = shapes.from_model(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    held = shape_of(model.config.to_dict())
    assert held.parameters == shape.parameters and held.exact
    assert all(linear.quantized and linear.adapted for linear in held.linears)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.0\..*(up|down)_proj"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_adapter_parameters_are_those_that_a_run_trains(tmp_path, lora: dict, method: str) -> None:
    tiny.save(tmp_path)
    model = attach(load_base(BaseOptions(str(tmp_path), method=method), CPU), LoraOptions(r=8, **lora), 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape_in(tmp_path, "cpu", method=method, **lora).trainable(8) == trained


def test_unknown_architecture_is_planned_from_its_tensors(tmp_path) -> None:
    tiny.model("llama", hidden_size=80, intermediate_size=112).save_pretrained(tmp_path)
    known = shape_in(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))
    unknown = shape_in(tmp_path)
    assert known.exact and not unknown.exact
    for name in ("parameters", "layers", "hidden", "q", "kv", "intermediate", "vocab", "embedding", "head"):
        assert getattr(unknown, name) == getattr(known, name), name
    assert sorted(x.numel for x in unknown.linears) == sorted(x.numel for x in known.linears)


def test_unknown_architecture_without_weights_is_planned_as_a_llama(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B | {"model_type": "llama9"}))
    found, real = shape_in(tmp_path), shape_of(LLAMA3_8B)
    assert not found.exact
    assert found.parameters == real.parameters and found.layers == real.layers and found.kv == real.kv


def test_unknown_architecture_of_unknown_size_says_what_to_add(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama9", "hidden_size": 64}')
    with pytest.raises(ConfigError, match=r"llama9.*num_hidden_layers, vocab_size: add the weights"):
        shape_in(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "vit"])
def test_what_is_no_causal_language_model_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=model_type):
        shape_of({"model_type": model_type})


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "falcon", "mixtral", "mamba", "cohere", "olmo2"])
def test_other_causal_language_models_are_planned(model_type: str) -> None:
    found = shape_of({"model_type": model_type, "num_hidden_layers": 2}, method="none")
    assert not found.exact and found.layers == 2 and found.parameters > 1e6


def test_large_shapes_take_no_memory() -> None:
    shape = shape_of(
        {
            "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        }
    )  # fmt: skip
    assert shape.parameters == 70_553_706_496  # Llama-3-70B
