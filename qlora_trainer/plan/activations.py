"""What one decoder layer keeps for its backward pass, and what it computes twice, by policy.

Legend, in features: h hidden, q queries, kv keys (or values), f MLP width; s bytes of an activation.

The reference path's formula is what autograd saves in transformers' layers with PEFT's LoRA around
bitsandbytes' 4-bit layers, counted tensor by tensor (tests/plan/test_activations.py counts again).
The fast path's mirrors the save set of `qlora_trainer/model/fuse.py`.
"""

from __future__ import annotations

from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape

POLICIES = ("none", "mlp", "full", "offload")  # from fastest to smallest


def saved_bytes(shape: ModelShape, settings: Settings, policy: str) -> int:
    """Bytes a token that one layer keeps on the device from its forward to its backward pass."""
    s, h = settings.dtype_bytes, shape.hidden
    if policy == "full":
        return s * h
    if policy == "offload":
        return 0
    return _fast(shape, s, policy) if settings.fast else _reference(shape, settings)


def _fast(shape: ModelShape, s: int, policy: str) -> int:
    """{x, 1/rms, q, k, v, attention's output and log-sum-exp, x2, 1/rms}, and {gate, up} unless `mlp`."""
    h, q, kv, f = shape.hidden, shape.q, shape.kv, shape.intermediate
    kept = s * (2 * h + 2 * q + 2 * kv) + 4 * shape.heads + 8
    if shape.head_norms:
        kept += s * (q + kv)  # q and k before their norms
    return kept if policy == "mlp" else kept + s * 2 * f


def _reference(shape: ModelShape, settings: Settings) -> int:
    s, h, q, kv, f = settings.dtype_bytes, shape.hidden, shape.q, shape.kv, shape.intermediate
    targets = [x for x in shape.targets(settings.target_modules) if x.layer == 0]
    # RMSNorm works on a float32 copy of its input and keeps it, LayerNorm keeps the input itself.
    kept = shape.norms * (4 * h + 4 if shape.norm == "rms" else s * h + 2 * s)
    kept += s * (2 * q + 2 * kv) + 4 * shape.heads  # attention: q, k, v, output, log-sum-exp
    if shape.head_norms:
        kept += 4 * (q + kv) + 4 * (shape.heads + shape.heads * kv // q)
    if shape.fused_qkv:
        kept += s * (2 * q + kv)  # v keeps all of qkv alive; attention's output is copied
    # act(gate) and its two factors; a ReLU keeps its output only, which the next LoRA shares.
    kept += s * f * (3 if shape.gated else 1 if shape.relu else 2)
    for wide in {x.in_features for x in targets if x.in_features == f and not shape.relu}:
        kept += s * wide  # the input of the down projection, for the gradient of its A
    inputs = {_input_of(x.name) for x in targets if x.in_features == h}
    kept += s * h * len(inputs & {"attention", "mlp"})  # outputs of the two norms, for theirs
    return kept + s * settings.r * len(targets)  # x·Aᵀ, for the gradient of B


def _input_of(name: str) -> str:
    if name in ("o_proj", "out_proj", "dense"):
        return "attention output"  # kept by attention already
    return (
        "attention" if any(mark in name for mark in ("q_", "k_", "v_", "qkv", "query", "c_attn")) else "mlp"
    )


def working_bytes(shape: ModelShape, settings: Settings) -> int:
    """Bytes a token that the backward pass of one layer needs beside what is saved.

    The gradients of the layer's output, of the MLP's inner activations and of its input are alive
    together; that is the widest point.
    """
    s, h, f = settings.dtype_bytes, shape.hidden, shape.intermediate
    inner = 3 if shape.gated else 2
    return s * (3 * h + inner * f)


def repeated(policy: str, settings: Settings) -> str:
    """Which part of a layer's forward pass runs twice: nothing, gate_up, or layer."""
    if policy == "full":
        return "layer"
    return "gate_up" if policy == "mlp" and settings.fast else "nothing"
