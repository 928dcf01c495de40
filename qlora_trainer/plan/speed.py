"""Seconds that a step takes, from the floating-point operations and bytes it cannot avoid.

FLOPs of a token, full length n: 4·N for the frozen linear layers (forward, and the gradient of the
input; they have no weight gradient), 4·V·h for the head where there is a label, 3.5·A for causal
attention with A = 2·n·q per layer, 6·P for the adapter; what is computed twice comes on top. Bytes:
weights that are dequantized, weights as products read them (what counts at a few hundred tokens), the
adapters with their gradients, and activations between the products, which weigh the less the wider a
model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.model.fused.inputs import busy_tokens
from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.memory import adapter_parameters, is_quantized, layer_codes, path_of
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape


@dataclass(frozen=True)
class Reach:
    """How much of the hardware a path reaches, measured on one H100 80GB (scripts/plan_grid.md).

    products, attention: shares of the peak FLOP/s. dequantization, activations: shares of the memory's
    bandwidth; the second counts every tensor between two products as read and written once by each
    operation that has to, so that separate operations show as a smaller share. adapter: bytes that a
    micro-batch moves for a parameter of the adapter. Seconds a layer and micro-batch: `starts`, lost while
    its kernels, about 75, start and end; `graphed`, the least that they take however small the model; `host`,
    the same where the host launches them and no CUDA graph.
    """

    products: float
    attention: float
    dequantization: float
    activations: float
    adapter: float
    starts: float
    graphed: float
    host: float


# A large product alone reaches 0.79 of the peak. The other shares, `adapter` and `starts` are those that fit
# 50 cells best, 7B to 70B, 208 to 350,000 tokens a micro-batch; `host`: two cells without graphs; `graphed`:
# the 12 ms of the demo's 30 layers.
FAST = Reach(0.79, 0.53, 0.735, 0.46, adapter=74, starts=0.00027, graphed=0.0004, host=0.005)
REFERENCE = Reach(0.78, 0.5, 0.6, 0.12, adapter=0, starts=0.0, graphed=0.010, host=0.010)
CPU = Reach(1.0, 1.0, 1.0, 1.0, adapter=0, starts=0.0, graphed=0.0, host=0.0)
FP8 = 1.75  # times the speed of a product in bfloat16, its operands' way to e4m3 included (same machine)
CPU_DEQUANTIZATION = 1.17  # an NF4 step beside one with dense weights
PADDED = 1.08  # micro-batches that graphs serve are padded by that (`inputs.pad_to_bucket`)


def busy_from(shape: ModelShape) -> int:
    """Tokens of a micro-batch from which CUDA graphs are of no use."""
    return busy_tokens(sum(x.numel for x in shape.linears) // shape.layers)


def reach(settings: Settings) -> Reach:
    if settings.device == "cpu":
        return CPU
    return FAST if settings.fast and settings.plain_kernels_because is None else REFERENCE


def repeated_work(shape: ModelShape, settings: Settings, what: str) -> float:
    """`repeated_flops` as products would take: attention, with norms and rotation before it, counts twice."""
    attention = _attention(shape, settings) if what in ("layer", "all but down") else 0.0
    return repeated_flops(shape, settings, what) + attention


def _attention(shape: ModelShape, settings: Settings) -> float:
    """FLOPs a token of causal attention in one layer, forward."""
    return 2.0 * settings.mean_length * shape.q


def repeated_flops(shape: ModelShape, settings: Settings, what: str) -> float:
    """FLOPs a token of the part of one layer's forward pass that runs twice."""
    if what == "nothing":
        return 0.0
    layer = [x for x in shape.linears if x.layer == 0]
    if what == "gate_up":
        return 2.0 * sum(x.numel for x in layer if x.name in ("gate_proj", "up_proj", "gate_up_proj"))
    adapter = adapter_parameters(shape, settings) / shape.layers
    down = sum(x.numel for x in layer if x.name == "down_proj") if what == "all but down" else 0
    return 2.0 * (sum(x.numel for x in layer) - down + adapter) + _attention(shape, settings)


def token_flops(shape: ModelShape, settings: Settings, policies: Sequence[str]) -> float:
    """FLOPs of one token, forward, backward and what is repeated."""
    linear = 4.0 * sum(x.numel for x in shape.linears)
    head = 4.0 * shape.head_numel * settings.supervised
    attention = 3.5 * _attention(shape, settings) * shape.layers
    adapter = 6.0 * adapter_parameters(shape, settings)
    return linear + head + attention + adapter + _again(shape, settings, policies)


def _again(shape: ModelShape, settings: Settings, policies: Sequence[str]) -> float:
    path = path_of(shape, settings)
    return sum(repeated_flops(shape, settings, path.repeats(policy)) for policy in policies)


def _whole_layers(shape: ModelShape, settings: Settings, policies: Sequence[str]) -> int:
    """Layers whose attention runs forward twice."""
    path = path_of(shape, settings)
    return sum(path.repeats(policy) in ("layer", "all but down") for policy in policies)


def activation_bytes(shape: ModelShape, settings: Settings, policies: Sequence[str]) -> float:
    """Bytes a token that the operations between products read and write, each tensor once.

    Of a layer: twice a sum of the stream and a norm (4 h), the rotation of queries and keys, the gated
    unit (3 f); twice that in the backward pass. Logits are written by their product, read, and written.
    """
    mlp = 4 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    layer = 4 * shape.hidden + 2 * (shape.q + shape.kv) + mlp
    again = {"nothing": 0, "gate_up": mlp}
    path = path_of(shape, settings)
    repeated = sum(again.get(path.repeats(policy), layer) for policy in policies)
    logits = 3 * shape.vocab * settings.supervised
    dropped = path.dropout_traffic() * shape.layers if settings.dropout and isinstance(path, FastPath) else 0
    return settings.dtype_bytes * (3.0 * layer * shape.layers + repeated + logits) + dropped


def micro_batch_seconds(
    shape: ModelShape,
    settings: Settings,
    hardware: Hardware,
    policies: Sequence[str],
    dequantized: int = 0,
    graphs: bool = False,
) -> float | None:
    """Seconds of one average micro-batch; None where the hardware's speed is not known."""
    if hardware.flops is None:
        return None
    part = reach(settings)
    tokens = settings.rows * settings.mean_length
    if graphs and settings.mean_length < settings.length:
        tokens = settings.rows * min(PADDED * settings.mean_length, settings.length)
    whole = _whole_layers(shape, settings, policies)
    passes = 2 + whole / len(policies)
    attention = _attention(shape, settings) * (3.5 * shape.layers + whole)
    products = token_flops(shape, settings, policies) - attention
    if settings.fp8:  # what is repeated is nearly all products with the base
        base = 4.0 * sum(x.numel for x in shape.linears) + _again(shape, settings, policies)
        products -= base * (1 - 1 / FP8)
    multiplied = tokens * products / (part.products * hardware.flops)
    if hardware.bandwidth is not None:  # products of a short micro-batch wait for their weights
        weights = (1 if settings.fp8 else settings.dtype_bytes) * sum(x.numel for x in shape.linears)
        multiplied = max(multiplied, passes * weights / hardware.bandwidth)
    seconds = multiplied + tokens * attention / (part.attention * hardware.flops)
    if hardware.bandwidth is not None:
        moved = tokens * activation_bytes(shape, settings, policies)
        seconds += moved / (hardware.bandwidth * part.activations)
        seconds += part.adapter * adapter_parameters(shape, settings) / hardware.bandwidth
    seconds += shape.layers * part.starts * passes / 2
    path = path_of(shape, settings)
    if is_quantized(settings) and not settings.fp8:
        if hardware.bandwidth is None:
            seconds *= 1.0 if dequantized else CPU_DEQUANTIZATION
        else:
            weight = sum(x.numel for x in shape.linears)
            weight -= min(weight, dequantized // settings.dtype_bytes)
            moved = weight * (0.52 + settings.dtype_bytes)  # read the codes, write 16-bit values
            seconds += passes * moved / (hardware.bandwidth * part.dequantization)
    if settings.offload == "layers" and hardware.bus is not None:  # up and down again, beside the work
        seconds = max(seconds, 2 * layer_codes(shape, settings) / hardware.bus)
    leaving = sum(path.on_host(policy) for policy in policies)
    if (
        leaving and hardware.bus is not None
    ):  # beside a forward pass, and back beside a backward pass twice as long
        seconds = max(seconds / 3, leaving / hardware.bus) + max(2 * seconds / 3, leaving / hardware.bus)
    return max(seconds, shape.layers * (part.graphed if graphs else part.host) * passes / 2)


def optimizer_seconds(
    shape: ModelShape, settings: Settings, hardware: Hardware, host_state: int
) -> float | None:
    """Seconds of one update: what moves in device memory, and over the bus for paged state."""
    if hardware.flops is None:
        return None
    elements = adapter_parameters(shape, settings)
    seconds = 0.0
    if hardware.bandwidth is not None:
        seconds += elements * 46 / (0.8 * hardware.bandwidth)  # norm, clipped update, rounding, zeroing
    if hardware.bus is not None:
        seconds += host_state / hardware.bus  # both directions at once
    return seconds
