"""transformers, PEFT and bitsandbytes modules -> `LayerParts`, or one line that says why not.

Structure decides, within the families listed here: which norms a layer has, whether q/k/v come
fused, whether heads are normed. Whatever this page does not know raises `Declined`, and the caller
leaves that module as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_trainer.kernels import HeadNorm, NestedScales, Operations, QuantizedWeight

from .parts import LayerParts, Norm
from .projection import Member, Projection, Workspace

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")


class Declined(Exception):
    """A module cannot be fused; the message is the reason, one line."""


def norm_of(module: Any) -> Norm:
    """An RMSNorm module's part; Gemma's store weight - 1."""
    kind = type(module).__name__
    if not kind.endswith("RMSNorm"):
        raise Declined(f"its norm is a {kind}")
    if module.weight.requires_grad:
        raise Declined("its norm is trained")
    eps = getattr(module, "variance_epsilon", None)
    return Norm(
        module.weight.detach(), module.eps if eps is None else eps, 1.0 if kind.startswith("Gemma") else 0.0
    )


def _head_norm(module: Any) -> HeadNorm:
    norm = norm_of(module)
    return HeadNorm(norm.weight, norm.eps, norm.offset)


def _four_bit(weight: Any, name: str) -> QuantizedWeight:
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise Declined(f"{name} is not quantized yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise Declined(f"{name} is packed for CPU inference")
    n, k = state.shape
    if k % 2:
        raise Declined(f"{name} has an odd input width")
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedScales(inner.code.float(), inner.absmax.float(), state.offset.float(), inner.blocksize)
    return QuantizedWeight(weight.data, state.code.float(), state.absmax, nested, state.blocksize, (n, k))


def _frozen(module: Any, name: str) -> QuantizedWeight | Tensor:
    """The weight of a plain or 4-bit linear layer."""
    kind = type(module).__name__
    if kind == "Linear4bit":
        return _four_bit(module.weight, name)
    if type(module) is not nn.Linear:
        raise Declined(f"{name} is a {kind}")
    if module.weight.requires_grad:
        raise Declined(f"{name}'s own weight is trained")
    return module.weight.detach()


def _member(module: Any, name: str) -> tuple[Member, Tensor | None]:
    """A linear layer with or without an adapter: (member, bias)."""
    if not isinstance(module, LoraLayer):
        return Member(name, _frozen(module, name)), getattr(module, "bias", None)
    base = module.get_base_layer()
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A:
        raise Declined(f"{name} has {len(active)} active adapters")
    (adapter,) = active
    if module.merged or module.disable_adapters:
        raise Declined(f"{name}'s adapter is merged or disabled")
    if (
        getattr(module, "use_dora", {}).get(adapter)
        or getattr(module, "lora_variant", {}).get(adapter) is not None
    ):
        raise Declined(f"{name} uses DoRA or another variant of LoRA")
    dropout = module.lora_dropout[adapter]
    if type(dropout) is nn.Identity:
        dropout = None
    elif type(dropout) is not nn.Dropout or dropout.p >= 1:
        raise Declined(f"{name} has lora_dropout={dropout}")
    a: Any = module.lora_A[adapter]
    b: Any = module.lora_B[adapter]
    if any(type(half) is not nn.Linear for half in (a, b)) or b.bias is not None:
        raise Declined(f"{name}'s adapter is not a plain pair of matrices")
    weight = _frozen(base, name)
    member = Member(name, weight, a.weight, b.weight, float(module.scaling[adapter]), dropout)
    return member, base.bias


def _group(
    parent: Any,
    names: Sequence[str],
    make: type[Projection],
    operations: Operations,
    workspace: Workspace,
    role: str,
) -> tuple[Projection, list[Tensor | None]]:
    members, biases = zip(*(_member(getattr(parent, name), name) for name in names), strict=True)
    if len({m.shape[1] for m in members}) != 1:
        raise Declined(f"{', '.join(names)} differ in input width")
    if len({m.dropout.p if m.dropout else 0.0 for m in members if m.lora_A is not None}) > 1:
        raise Declined(f"{', '.join(names)} differ in lora_dropout")
    return make("+".join(names), members, operations, workspace, role), list(biases)


def _unbiased(projection: Projection, biases: Sequence[Tensor | None]) -> Projection:
    if any(bias is not None for bias in biases):
        raise Declined(f"{projection.name} has a bias")
    return projection


def _activation(mlp: Any) -> str:
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    kind = type(function).__name__
    if kind in ("SiLU", "SiLUActivation"):
        return "silu"
    if kind in ("GELUTanh", "PytorchGELUTanh") or (
        kind == "GELU" and getattr(function, "approximate", "") == "tanh"
    ):
        return "gelu_tanh"
    raise Declined(f"its activation is {kind}")


def window_of(attention: Any, config: Any) -> int | None:
    """Keys a query sees, or None for all before it."""
    if hasattr(attention, "sliding_window"):
        found: int | None = attention.sliding_window
        return found
    return getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None


def recognise(
    module: Any,
    name: str,
    config: Any,
    operations: Operations,
    workspace: Workspace,
    make: type[Projection] = Projection,
) -> LayerParts:
    """The parts of one decoder layer; `make` builds its groups of projections.

    Raises:
        Declined: the layer has something the fused path does not compute.
    """
    if config.model_type not in FAMILIES:
        raise Declined(f"model type {config.model_type} is not one of the fast path's families")
    attention, mlp = module.self_attn, module.mlp
    if getattr(attention, "attn_logit_softcapping", None) is not None and config.model_type == "gemma2":
        raise Declined("attention soft-capping: no fused attention computes it")
    if (getattr(config, "attention_dropout", 0.0) or 0.0) > 0 or (
        getattr(config, "resid_pdrop", 0.0) or 0.0
    ) > 0:
        raise Declined("its configuration has dropout")
    if not getattr(attention, "is_causal", True):
        raise Declined("its attention is not causal")

    fused_qkv = hasattr(attention, "qkv_proj")
    names = ("qkv_proj",) if fused_qkv else ("q_proj", "k_proj", "v_proj")
    qkv, biases = _group(attention, names, make, operations, workspace, "other")
    some = [b for b in biases if b is not None]
    if some and len(some) != len(biases):
        raise Declined("only some of q, k, v have a bias")
    bias = torch.cat([b.detach() for b in some]) if some else None
    dim = attention.head_dim
    n_q, n_k = config.num_attention_heads, config.num_key_value_heads
    if qkv.n != (n_q + 2 * n_k) * dim:
        raise Declined(f"{qkv.name} is {qkv.n} wide, not {n_q} + 2·{n_k} heads of {dim}")
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_head_norm(attention.q_norm), _head_norm(attention.k_norm))
        if head_norms[0].weight.shape != (dim,) or head_norms[0].eps != head_norms[1].eps:
            raise Declined("its q/k norms are not one RMSNorm a head")

    sandwich = hasattr(module, "pre_feedforward_layernorm")
    gate_names = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    return LayerParts(
        name=name,
        input_norm=norm_of(module.input_layernorm),
        qkv=qkv,
        qkv_bias=bias,
        head_norms=head_norms,
        heads=(n_q, n_k, dim),
        softmax_scale=float(attention.scaling),
        window=window_of(attention, config),
        layer_type=layer_type_of(module, attention),
        o=_unbiased(*_group(attention, ("o_proj",), make, operations, workspace, "other")),
        attention_output_norm=norm_of(module.post_attention_layernorm) if sandwich else None,
        mlp_norm=norm_of(module.pre_feedforward_layernorm if sandwich else module.post_attention_layernorm),
        gate_up=_unbiased(*_group(mlp, gate_names, make, operations, workspace, "gate_up")),
        down=_unbiased(*_group(mlp, ("down_proj",), make, operations, workspace, "other")),
        activation=_activation(mlp),
        mlp_output_norm=norm_of(module.post_feedforward_layernorm) if sandwich else None,
    )


def layer_type_of(module: Any, attention: Any) -> str | None:
    """Which rotary table a layer reads, where a model has several (Gemma 3)."""
    found = getattr(attention, "layer_type", None) or getattr(module, "attention_type", None)
    return found if isinstance(found, str) else None


class Rotary:
    """position ids [B, T] -> layer type -> float32 (cos, sin) [B*T, half], by the model's own module."""

    def __init__(self, module: Any, layer_types: Sequence[str | None]) -> None:
        self.module, self.layer_types = module, list(dict.fromkeys(layer_types))
        self.by_type = hasattr(module, "layer_types")
        kinds = module.rope_type.values() if isinstance(module.rope_type, dict) else (module.rope_type,)
        # these look at the positions' values on the host, which no captured graph can
        self.asks_the_host = any(kind in ("dynamic", "longrope") for kind in kinds)

    def __call__(self, position_ids: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        like = torch.empty(
            0, dtype=torch.float32, device=position_ids.device
        )  # the table's dtype, not its values
        tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        shared: tuple[Tensor, Tensor] | None = None
        for layer_type in self.layer_types:
            if self.by_type:
                tables[layer_type] = self._half(*self.module(like, position_ids, layer_type))
            else:
                if shared is None:
                    shared = self._half(*self.module(like, position_ids))
                tables[layer_type] = shared
        return tables

    @staticmethod
    def _half(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the module's tables are equal."""
        half = cos.shape[-1] // 2
        return cos[..., :half].flatten(0, 1).contiguous(), sin[..., :half].flatten(0, 1).contiguous()
