"""Adapters that begin as a part of the weight: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

The base's weight W becomes the residual W - s·B0·A0, and A and B begin as A0 and B0: the first loss is the
base's. That residual lives in memory only. Whatever is stored is plain LoRA of rank 2r on the original
base, s·[B, -B0]·[A; A0], which any reader of LoRA understands, and from which a resumed run takes A0 and B0
as they were. So the base on disk is the base everywhere, and no later reader has to know how A and B began.

A0 and B0 are rounded to the adapter's dtype before they leave the weight, so stored factors lose nothing.
What remains is the residual's own rounding to the base's dtype. On quantized weights the residual would be
quantized anew and no adapter could undo that, so the configuration refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError

_PREFIX = "base_model.model."
_LOST = ("pissa_niter_", "corda", "lora_ga", "loftq")  # drawn, or taken from data that the adapter lacks


@dataclass(frozen=True)
class Beginning:
    """A0 [r, in] and B0 [out, r] of one layer, on the CPU; of ours in the adapter's dtype."""

    a: Tensor
    b: Tensor


def is_residual(init: object) -> bool:
    """Whether `init_lora_weights` takes its first values out of the base's weight."""
    return re.fullmatch(r"pissa(_niter_\d+)?|olora", str(init)) is not None


def check_foreign(config: Mapping[str, Any], where: object) -> None:
    """Refuses an adapter whose residual cannot be computed again from the base alone.

    PiSSA's and OLoRA's can: PEFT does so too when it loads such an adapter.

    Args:
        config: the contents of adapter_config.json.

    Raises:
        ConfigError: saying how to convert it.
    """
    init = str(config.get("init_lora_weights"))
    if init.startswith(_LOST):
        raise ConfigError(
            f"{where}: init_lora_weights={init} changed the base's weights in a way that the adapter does "
            "not hold; save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), "
            "which gives plain LoRA, and use that"
        )


def first_factors(weight: Tensor, init: str, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] in float32: scaling·B0·A0 is the part of `weight` [out, in] they stand for.

    PiSSA takes the r largest singular values, by a full decomposition or, as `pissa_niter_N`, by a
    randomized one of N iterations; OLoRA the first r columns of Q and rows of R.

    Raises:
        ConfigError: r is larger than a side of the weight.
    """
    if r > min(weight.shape):
        raise ConfigError(f"lora.r={r}: {init} takes r directions of a weight of {list(weight.shape)}")
    weight = weight.float()
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(init.rpartition("_")[2]))
        vh = v.T
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


@torch.no_grad()
def begin(model: PeftModel, init: str, stored: Mapping[str, Tensor] | None = None) -> None:
    """Gives every adapter its first values and takes them out of the base's weights.

    Args:
        model: with adapters in their dtype, and a base that is not quantized.
        stored: a checkpoint's adapter, whose A0 and B0 are taken as they are: computed on another machine
            they may differ in their last bits.

    Raises:
        ConfigError: a layer that has no such beginning: an embedding, a weight that is shared, r too large.
    """
    shared = model.get_base_model().get_input_embeddings().weight
    beginnings: dict[str, Beginning] = {}
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        if "default" not in layer.lora_A or weight is shared:
            raise ConfigError(
                f"lora.init_lora_weights={init}: {name.removeprefix(_PREFIX)} is an embedding or shares its "
                "weight with one; leave it out of lora.target_modules, or use init_lora_weights=true"
            )
        a, b = (half["default"].weight for half in (layer.lora_A, layer.lora_B))
        first = _stored_beginning(stored, name, a.shape[0]) if stored else None
        if first is None or first.a.shape != a.shape or first.b.shape != b.shape:
            factors = first_factors(weight, init, a.shape[0], layer.scaling["default"])
            first = Beginning(*(factor.to(a.dtype).cpu() for factor in factors))
        a.copy_(first.a)
        b.copy_(first.b)
        _take_out(layer, first)
        beginnings[name] = first
    model.beginnings = beginnings


@torch.no_grad()
def begin_foreign(model: PeftModel, init: str) -> None:
    """Makes the base's weights the residuals that an adapter of another program learned on.

    Args:
        model: with that adapter loaded as if it were plain LoRA, on the original base.
        init: pissa or olora, whose A0 and B0 follow from the weight alone; PEFT does not round them.
    """
    beginnings: dict[str, Beginning] = {}
    for name, layer in _layers(model):
        r, scaling = layer.r["default"], layer.scaling["default"]
        factors = first_factors(layer.get_base_layer().weight, init, r, scaling)
        beginnings[name] = Beginning(*(factor.cpu() for factor in factors))
        _take_out(layer, beginnings[name])
    model.beginnings = beginnings


def adapter_tensors(model: PeftModel, **how: Any) -> dict[str, Tensor]:
    """The adapter under PEFT's own names for its file, as plain LoRA on the original base.

    Args:
        how: for `peft.get_peft_model_state_dict`.
    """
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, **how)
    for name, first in _beginnings(model).items():
        a, b = (tensors[f"{name}.lora_{half}.weight"] for half in "AB")
        tensors[f"{name}.lora_A.weight"] = torch.cat((a, first.a.to(a.device)))
        tensors[f"{name}.lora_B.weight"] = torch.cat((b, -first.b.to(b.device)), dim=1)
    return tensors


def published_tensors(model: PeftModel) -> dict[str, Tensor]:
    """`adapter_tensors` for those who compute with them.

    B·A and B0·A0 nearly cancel: products in bfloat16 would drown a light tuning in the rounding of both
    (0.4% of the weight's largest part), so both are given in float32, which readers keep.
    """
    tensors = adapter_tensors(model)
    names = [f"{name}.lora_{half}.weight" for name in _beginnings(model) for half in "AB"]
    return tensors | {name: tensors[name].float() for name in names}


def adapter_settings(model: PeftModel) -> LoraConfig:
    """A copy of the adapter's configuration that is true of `adapter_tensors`."""
    stored = model.peft_config["default"]
    config = type(stored)(**{k: v for k, v in vars(stored).items() if k in type(stored).__dataclass_fields__})
    if _beginnings(model):
        config.r = 2 * stored.r
        # the same scaling at twice the rank
        config.lora_alpha = stored.lora_alpha * (2**0.5 if stored.use_rslora else 2)
    return config


def take_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts `adapter_tensors` of a checkpoint back; their A0 and B0 have been taken by `begin`."""
    tensors = dict(tensors)
    for name, first in _beginnings(model).items():
        r = first.a.shape[0]
        tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:r]
        tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"][:, :r]
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys, result.unexpected_keys


@contextmanager
def base_alone(model: PeftModel) -> Iterator[None]:
    """Inside the block `model` computes what its base did before anything was trained.

    Adapters and `modules_to_save` are off, and what `begin` took out of the weights is added again.
    """
    with ExitStack() as stack:
        stack.enter_context(model.disable_adapter())
        beginnings = _beginnings(model)
        for name, layer in _layers(model):
            if name in beginnings:
                add = _Principal(beginnings[name], layer.scaling["default"], layer.get_base_layer().weight)
                stack.callback(layer.register_forward_hook(add).remove)
        yield


def changed_base(model: nn.Module) -> bool:
    """Whether the base's weights in memory are residuals."""
    return bool(getattr(model, "beginnings", None))


class _Principal:
    """A forward hook that adds s·B0·A0·x to the output of a layer whose weight is the residual."""

    def __init__(self, first: Beginning, scaling: float, weight: Tensor) -> None:
        self.a = first.a.to(weight.device, weight.dtype)
        self.b = first.b.to(weight.device, weight.dtype) * scaling

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(self.a.dtype)
        return output + ((x @ self.a.T) @ self.b.T).to(output.dtype)


def _take_out(layer: Any, first: Beginning) -> None:
    weight = layer.get_base_layer().weight
    a, b = first.a.to(weight.device, torch.float32), first.b.to(weight.device, torch.float32)
    weight.copy_(weight.float() - layer.scaling["default"] * (b @ a))


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


def _beginnings(model: PeftModel) -> dict[str, Beginning]:
    found: dict[str, Beginning] = getattr(model, "beginnings", {})
    return found


def _stored_beginning(stored: Mapping[str, Tensor], name: str, r: int) -> Beginning | None:
    a, b = (stored.get(f"{name}.lora_{half}.weight") for half in "AB")
    return None if a is None or b is None else Beginning(a[r:], -b[:, r:])
