"""A quantized base of any shape with random weights, made in seconds and without 16-bit weights.

In: a transformers config and a device. Out: what `load.load_base` gives, ready for adapters, for
benchmarks, memory grids and tests: nobody downloads 140 GB to learn how fast 70B trains. The 4-bit
codes are drawn as they are, uniformly: NF4 spaces its values so that normal weights use all alike.
Nothing is left at zero or one, neither norms nor biases: a kernel that forgets one must not pass.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.linears import as_plain_linears
from qlora_trainer.model.load import keep_unpacked

BLOCK, NESTED_BLOCK = 64, 256  # elements a scale, scales a second-level scale: bitsandbytes' defaults
SPREAD = 0.2  # of the scales around their mean
NOISE = 0.02  # of biases around zero and norms around theirs


def random_base(
    config: Any,
    device: torch.device,
    *,
    method: str = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PreTrainedModel:
    """A frozen causal language model whose linear layers, but the head, are random 4-bit weights.

    Weights have standard deviation 1/√(input width), so that deep stacks stay finite. Peak memory is the
    model's own size.

    Args:
        method: nf4, fp4, or none for random weights in `dtype`.
        double_quant: of the 4-bit blocks' constants.

    Raises:
        ConfigError: another method.
    """
    if method not in ("nf4", "fp4", "none"):
        raise ConfigError(f"quantization.method={method}: random weights are made for nf4, fp4 and none")
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method != "none":
        as_plain_linears(model)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent = model.get_submodule(name.rpartition(".")[0])
            if method != "none":
                setattr(
                    parent, name.rpartition(".")[2], _linear(module, method, double_quant, dtype, generator)
                )
                continue
            module.to_empty(device=device)
            module.weight.data.normal_(std=module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # transformers draws from the global generator
        for module in model.modules():
            if any(tensor.is_meta for tensor in _own(module)):
                module.to_empty(device=device, recurse=False)
                model._init_weights(module)
    model.tie_weights()
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.empty_like(parameter).normal_(std=NOISE, generator=generator)
            parameter.add_(noise)
    model.config.use_cache = False
    if method != "none":
        model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT asks for
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return model


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _linear(
    plain: nn.Linear, method: str, double_quant: bool, dtype: torch.dtype, generator: torch.Generator
) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer of the size of `plain`, on the generator's device."""
    device = generator.device
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=dtype,
            compress_statistics=double_quant,
            quant_type=method,
        )
    layer.weight = bnb.nn.Params4bit(
        torch.randint(
            0, 256, (plain.weight.numel() // 2, 1), dtype=torch.uint8, device=device, generator=generator
        ),
        requires_grad=False,
        quant_state=_state(plain, method, double_quant, dtype, generator),
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type=method,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = layer.weight.quant_state
    keep_unpacked(layer)
    if plain.bias is not None:
        layer.bias = nn.Parameter(
            torch.zeros(plain.out_features, dtype=dtype, device=device), requires_grad=False
        )
    return layer


def _state(
    plain: nn.Linear, method: str, double_quant: bool, dtype: torch.dtype, generator: torch.Generator
) -> bnb_functional.QuantState:
    device = generator.device
    blocks = -(-plain.weight.numel() // BLOCK)
    code = bnb_functional.get_4bit_type(method, device=device)
    scale = plain.in_features**-0.5 / float(code.square().mean().sqrt())
    state = bnb_functional.QuantState(
        absmax=torch.empty(0),
        shape=plain.weight.shape,
        code=code,
        blocksize=BLOCK,
        quant_type=method,
        dtype=dtype,
    )
    if not double_quant:
        noise = torch.rand(blocks, device=device, generator=generator)
        state.absmax = noise.mul_(2 * SPREAD).add_(1 - SPREAD).mul_(scale)
        return state
    state.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device, generator=generator)
    state.offset = torch.full((), scale, device=device)
    state.state2 = bnb_functional.QuantState(
        absmax=torch.full((-(-blocks // NESTED_BLOCK),), SPREAD * scale, device=device),
        code=bnb_functional.create_dynamic_map().to(device),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    state.nested = True
    return state
