"""A description and the modules it is of -> the parts that run: weights, adapters, groups of projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.kernels import HeadNorm, NestedScales, Operations, QuantizedWeight

from .attention import AttentionParts
from .mlp import MlpParts
from .norm import Norm
from .parts import LayerParts
from .projection import Member, Projection
from .spec import GroupSpec, LayerSpec, LinearSpec, NormSpec
from .workspace import Workspace


def bind(
    spec: LayerSpec,
    layer: nn.Module,
    operations: Operations,
    workspace: Workspace,
    make: type[Projection] = Projection,
) -> LayerParts:
    """The parts of the decoder layer that `spec` describes; `make` builds its groups of projections."""

    def norm(of: NormSpec | None) -> Norm | None:
        return None if of is None else bind_norm(of, layer)

    def group(of: GroupSpec, role: str = "other") -> Projection:
        members = [_member(member, layer) for member in of.members]
        return make(of.name, members, operations, workspace, role)

    qkv = group(spec.qkv)
    biases = [_base_of(member, layer).bias for member in spec.qkv.members if member.bias]
    q_norm, k_norm = (norm(part) for part in spec.head_norms or (None, None))
    return LayerParts(
        AttentionParts(
            input_norm=bind_norm(spec.input_norm, layer),
            qkv=qkv,
            qkv_bias=torch.cat([bias.detach() for bias in biases]) if biases else None,
            head_norms=None if q_norm is None or k_norm is None else (_per_head(q_norm), _per_head(k_norm)),
            heads=spec.heads,
            softmax_scale=spec.softmax_scale,
            window=spec.window,
            layer_type=spec.layer_type,
            o=group(spec.o),
            output_norm=norm(spec.attention_output_norm),
        ),
        MlpParts(
            input_norm=bind_norm(spec.mlp_norm, layer),
            gate_up=group(spec.gate_up, "gate_up"),
            down=group(spec.down),
            activation=spec.activation,
            output_norm=norm(spec.mlp_output_norm),
        ),
    )


def bind_norm(spec: NormSpec, parent: nn.Module) -> Norm:
    weight: Any = parent.get_submodule(spec.path).weight
    return Norm(weight.detach(), spec.eps, spec.offset)


def _per_head(norm: Norm) -> HeadNorm:
    return HeadNorm(norm.weight, norm.eps, norm.offset)


def _base_of(spec: LinearSpec, layer: nn.Module) -> Any:
    module: Any = layer.get_submodule(spec.path)
    return module if spec.adapter is None else module.get_base_layer()


def _member(spec: LinearSpec, layer: nn.Module) -> Member:
    base = _base_of(spec, layer)
    weight = _four_bit(base.weight, spec.name) if spec.four_bit else base.weight.detach()
    if spec.adapter is None:
        return Member(spec.name, weight)
    module: Any = layer.get_submodule(spec.path)
    (adapter,) = module.active_adapters
    dropout = module.lora_dropout[adapter]
    return Member(
        spec.name,
        weight,
        module.lora_A[adapter].weight,
        module.lora_B[adapter].weight,
        spec.adapter.scaling,
        dropout if type(dropout) is nn.Dropout else None,
    )


def _four_bit(weight: Any, name: str) -> QuantizedWeight:
    state: Any = getattr(weight, "quant_state", None)
    assert state is not None, f"{name} is not quantized yet"
    assert not getattr(state, "packing_format_for_cpu", False), f"{name} is packed for CPU inference"
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedScales(inner.code.float(), inner.absmax.float(), state.offset.float(), inner.blocksize)
    packed: Tensor = weight.data
    return QuantizedWeight(packed, state.code.float(), state.absmax, nested, state.blocksize, (*state.shape,))
