"""transformers, PEFT and bitsandbytes modules -> their description, or one line that says why not.

Structure decides, within the families listed here: which norms a layer has, whether q/k/v come fused,
whether heads are normed. Nothing here reads a tensor's values: a skeleton on the meta device gives the
same description as the model that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_trainer.model.layers import causal_of
from qlora_trainer.model.linears import is_packed

from .spec import AdapterSpec, Declined, GroupSpec, HeadSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")


class _Unknown(Exception):
    """Something that the fast path does not compute; the message is the reason, one line."""


def describe_model(model: nn.Module) -> ModelSpec:
    """The description of a causal language model, with adapters or without."""
    causal: Any = causal_of(model)
    kind = causal.config.model_type
    if kind not in FAMILIES:
        declined = Declined(f"model type {kind} is not one of the fast path's families")
        return ModelSpec((), declined, declined)
    layers = tuple(describe(layer, causal.config) for layer in causal.model.layers)
    return ModelSpec(layers, _describe_head(causal))


def describe(layer: nn.Module, config: Any) -> LayerSpec | Declined:
    """The description of one decoder layer of a model with this configuration."""
    try:
        return _layer(layer, config)
    except _Unknown as why:
        return Declined(str(why))


def _describe_head(causal: Any) -> HeadSpec | Declined:
    head = causal.get_output_embeddings()
    try:
        if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
            raise _Unknown(f"it is a {type(head).__name__}")
        if head.weight.requires_grad:
            raise _Unknown("it is trained")
        norm = _norm(causal.model, "norm")
    except _Unknown as why:
        return Declined(str(why))
    return HeadSpec(norm, head.out_features, getattr(causal.config, "final_logit_softcapping", None))


def _norm(parent: Any, path: str) -> NormSpec:
    """An RMSNorm module; Gemma's store weight - 1."""
    module = parent.get_submodule(path)
    kind = type(module).__name__
    if not kind.endswith("RMSNorm"):
        raise _Unknown(f"its norm is a {kind}")
    if module.weight.requires_grad:
        raise _Unknown("its norm is trained")
    eps = getattr(module, "variance_epsilon", None)
    offset = 1.0 if kind.startswith("Gemma") else 0.0
    return NormSpec(path, module.weight.shape[0], module.eps if eps is None else eps, offset)


def _linear(parent: Any, path: str) -> LinearSpec:
    """A linear layer with or without an adapter."""
    module = parent.get_submodule(path)
    name = path.rpartition(".")[2]
    base, adapter = module, None
    if isinstance(module, LoraLayer):
        base, adapter = module.get_base_layer(), _adapter(module, name)
    four_bit = _is_four_bit(base, name)
    return LinearSpec(path, base.out_features, base.in_features, four_bit, base.bias is not None, adapter)


def _is_four_bit(module: Any, name: str) -> bool:
    kind = type(module).__name__
    if kind == "Linear4bit":
        if module.in_features % 2:
            raise _Unknown(f"{name} has an odd input width")
        return True
    if is_packed(module):
        raise _Unknown(f"{name} is a GPTQ or AWQ layer")
    if type(module) is not nn.Linear:
        raise _Unknown(f"{name} is a {kind}")
    if module.weight.requires_grad:
        raise _Unknown(f"{name}'s own weight is trained")
    return False


def _adapter(module: Any, name: str) -> AdapterSpec:
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A:
        raise _Unknown(f"{name} has {len(active)} active adapters")
    (adapter,) = active
    if module.merged or module.disable_adapters:
        raise _Unknown(f"{name}'s adapter is merged or disabled")
    if (
        getattr(module, "use_dora", {}).get(adapter)
        or getattr(module, "lora_variant", {}).get(adapter) is not None
    ):
        raise _Unknown(f"{name} uses DoRA or another variant of LoRA")
    dropout = module.lora_dropout[adapter]
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1):
        raise _Unknown(f"{name} has lora_dropout={dropout}")
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if any(type(half) is not nn.Linear for half in (a, b)) or b.bias is not None:
        raise _Unknown(f"{name}'s adapter is not a plain pair of matrices")
    rate = dropout.p if type(dropout) is nn.Dropout else 0.0
    return AdapterSpec(a.weight.shape[0], float(module.scaling[adapter]), rate)


def _group(layer: Any, parent: str, names: Sequence[str], *, biased: bool = False) -> GroupSpec:
    group = GroupSpec(tuple(_linear(layer, f"{parent}.{name}") for name in names))
    if len({member.k for member in group.members}) != 1:
        raise _Unknown(f"{', '.join(names)} differ in input width")
    if len({member.adapter.dropout for member in group.members if member.adapter is not None}) > 1:
        raise _Unknown(f"{', '.join(names)} differ in lora_dropout")
    if not biased and any(member.bias for member in group.members):
        raise _Unknown(f"{group.name} has a bias")
    return group


def _activation(mlp: Any) -> str:
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    kind = type(function).__name__
    if kind in ("SiLU", "SiLUActivation"):
        return "silu"
    if kind in ("GELUTanh", "PytorchGELUTanh") or (
        kind == "GELU" and getattr(function, "approximate", "") == "tanh"
    ):
        return "gelu_tanh"
    raise _Unknown(f"its activation is {kind}")


def window_of(attention: Any, config: Any) -> int | None:
    """Keys a query sees, or None for all before it."""
    if hasattr(attention, "sliding_window"):
        found: int | None = attention.sliding_window
        return found
    return getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None


def layer_type_of(module: Any, attention: Any) -> str | None:
    """Which rotary table a layer reads, where a model has several (Gemma 3)."""
    found = getattr(attention, "layer_type", None) or getattr(module, "attention_type", None)
    return found if isinstance(found, str) else None


def _layer(module: Any, config: Any) -> LayerSpec:
    attention, mlp = module.self_attn, module.mlp
    if getattr(attention, "attn_logit_softcapping", None) is not None and config.model_type == "gemma2":
        raise _Unknown("attention soft-capping: no fused attention computes it")
    if (getattr(config, "attention_dropout", 0.0) or 0.0) > 0 or (
        getattr(config, "resid_pdrop", 0.0) or 0.0
    ) > 0:
        raise _Unknown("its configuration has dropout")
    if not getattr(attention, "is_causal", True):
        raise _Unknown("its attention is not causal")

    names = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    qkv = _group(module, "self_attn", names, biased=True)
    if len({member.bias for member in qkv.members}) > 1:
        raise _Unknown("only some of q, k, v have a bias")
    dim = attention.head_dim
    n_q, n_k = config.num_attention_heads, config.num_key_value_heads
    if qkv.n != (n_q + 2 * n_k) * dim:
        raise _Unknown(f"{qkv.name} is {qkv.n} wide, not {n_q} + 2·{n_k} heads of {dim}")
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_norm(module, "self_attn.q_norm"), _norm(module, "self_attn.k_norm"))
        if head_norms[0].size != dim or head_norms[0].eps != head_norms[1].eps:
            raise _Unknown("its q/k norms are not one RMSNorm a head")

    sandwich = hasattr(module, "pre_feedforward_layernorm")
    gate_names = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    return LayerSpec(
        input_norm=_norm(module, "input_layernorm"),
        qkv=qkv,
        head_norms=head_norms,
        heads=(n_q, n_k, dim),
        softmax_scale=float(attention.scaling),
        window=window_of(attention, config),
        layer_type=layer_type_of(module, attention),
        o=_group(module, "self_attn", ("o_proj",)),
        attention_output_norm=_norm(module, "post_attention_layernorm") if sandwich else None,
        mlp_norm=_norm(module, f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm"),
        gate_up=_group(module, "mlp", gate_names),
        down=_group(module, "mlp", ("down_proj",)),
        activation=_activation(mlp),
        mlp_output_norm=_norm(module, "post_feedforward_layernorm") if sandwich else None,
    )
