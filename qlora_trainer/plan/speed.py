"""Seconds that a step takes, from the floating-point operations and bytes it cannot avoid.

FLOPs of a token, full length n: 4·N for the frozen linear layers (forward, and the gradient of the
input; they have no weight gradient), 4·V·h for the head where there is a label, 3.5·A for causal
attention with A = 2·n·q per layer, 6·P for the adapter; what is computed twice comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.plan.activations import repeated
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.memory import adapter_parameters, is_quantized
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape


@dataclass(frozen=True)
class Reach:
    """How much of the hardware a path reaches, measured on one H100 80GB with the Llama-3-8B shape.

    flops, bandwidth: share of the peak, in products and in dequantization. host: seconds a layer and
    micro-batch that the host needs to launch a forward and backward pass, which bounds short ones.
    """

    flops: float
    bandwidth: float
    host: float


FAST = Reach(flops=0.52, bandwidth=0.75, host=0.0025)
REFERENCE = Reach(flops=0.28, bandwidth=0.6, host=0.010)
CPU = Reach(flops=1.0, bandwidth=1.0, host=0.0)
CPU_DEQUANTIZATION = 1.17  # an NF4 step beside one with dense weights


def reach(settings: Settings) -> Reach:
    if settings.device == "cpu":
        return CPU
    return FAST if settings.fast else REFERENCE


def forward_flops(shape: ModelShape, settings: Settings) -> dict[str, float]:
    """FLOPs of one token's forward pass: per layer `layer` and within it `gate_up`; and `head`."""
    adapter = adapter_parameters(shape, settings) / shape.layers
    linear = sum(x.numel for x in shape.linears if x.layer is not None) / shape.layers
    gate_up = sum(
        x.numel for x in shape.linears if x.layer == 0 and x.name in ("gate_proj", "up_proj", "gate_up_proj")
    )
    attention = 2.0 * settings.mean_length * shape.q
    return {
        "layer": 2 * linear + attention + 2 * adapter,
        "gate_up": 2.0 * gate_up,
        "head": 2.0 * shape.head_numel * settings.supervised,
    }


def token_flops(shape: ModelShape, settings: Settings, policies: Sequence[str]) -> float:
    """FLOPs of one token, forward, backward and what is repeated."""
    forward = forward_flops(shape, settings)
    adapter = adapter_parameters(shape, settings)
    linear = sum(x.numel for x in shape.linears)
    attention = 2.0 * settings.mean_length * shape.q * shape.layers
    once = 4.0 * linear + 2 * forward["head"] + 3.5 * attention + 6 * adapter
    twice = {"layer": forward["layer"], "gate_up": forward["gate_up"], "nothing": 0.0}
    return once + sum(twice[repeated(policy, settings)] for policy in policies)


def micro_batch_seconds(
    shape: ModelShape, settings: Settings, hardware: Hardware, policies: Sequence[str]
) -> float | None:
    """Seconds of one average micro-batch; None where the hardware's speed is not known."""
    if hardware.flops is None:
        return None
    part = reach(settings)
    tokens = settings.rows * settings.mean_length
    seconds = tokens * token_flops(shape, settings, policies) / (hardware.flops * part.flops)
    passes = 2 + sum(repeated(policy, settings) == "layer" for policy in policies) / len(policies)
    if is_quantized(settings):
        if hardware.bandwidth is None:
            seconds *= CPU_DEQUANTIZATION
        else:
            weight = sum(x.numel for x in shape.linears)
            moved = weight * (0.52 + settings.dtype_bytes)  # read the codes, write 16-bit values
            seconds += passes * moved / (hardware.bandwidth * part.bandwidth)
    return max(seconds, shape.layers * part.host * passes / 2)


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
