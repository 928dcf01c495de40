"""A model of any `config.json` with random frozen weights, quantized as it is made, one layer at a time.

Values are normal with the configuration's own spread: speed and memory of a product do not depend on
them, except that zeros would flatter a GPU that saves power on them.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def _random(shape: torch.Size, std: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)


def _four_bit(linear: nn.Linear, weight: torch.Tensor, quant_type: str, nested: bool) -> nn.Module:
    result = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype,
        compress_statistics=nested, quant_type=quant_type, device="meta",
    )  # fmt: skip
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    result.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, compress_statistics=nested, quant_type=quant_type,
        bnb_quantized=True, module=result,
    )  # fmt: skip
    result.quant_state = state
    return result


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    nested: bool,
    seed: int = 0,
) -> PreTrainedModel:
    """A frozen causal LM on `device`.

    Args:
        quantization: "nf4", "fp4", or "none" for a 16-bit base.
        nested: double quantization of the constants.
    """
    torch.manual_seed(seed)
    std = float(getattr(config, "initializer_range", 0.02))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head and quantization != "none":
                weight = _random(child.weight.shape, std, device, dtype)
                replacement = _four_bit(child, weight, quantization, nested)
                if child.bias is not None:
                    replacement.bias = nn.Parameter(_random(child.bias.shape, std, device, dtype))
                setattr(module, name, replacement)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _random(parameter.shape, std, device, dtype)
                if "Norm" in type(module).__name__:
                    value += 0.0 if type(module).__name__.startswith("Gemma") else 1.0
                setattr(module, name, nn.Parameter(value))
    model.tie_weights()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                if "Rotary" in type(child).__name__:
                    setattr(module, name, type(child)(config=config).to(device))
                elif hasattr(child, "scalar_embed_scale"):
                    child.embed_scale = torch.tensor(child.scalar_embed_scale, device=device)
    model.is_loaded_in_4bit = quantization != "none"
    return model.requires_grad_(False)
