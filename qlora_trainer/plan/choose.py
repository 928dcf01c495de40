"""The fastest mix of activation policies and resident optimizer pages that the memory holds.

In: shape, settings, hardware. Out: `Choice`. Every layer starts with nothing recomputed and all
optimizer state on the device; what costs the fewest seconds for each byte it frees goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_trainer.plan import memory
from qlora_trainer.plan.activations import repeated, saved_bytes
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape
from qlora_trainer.plan.speed import forward_flops, reach

USABLE = 0.97  # of the device: the rest goes to fragmentation
COMFORTABLE = 0.92  # of the device: with the margin by which the plan may be wrong left free
UNKNOWN_FLOPS, UNKNOWN_BUS = 100e12, 25e9  # only their ratio matters here


@dataclass(frozen=True)
class Choice:
    """Policy of every layer; optimizer bytes on the device (slots beside them) and on the host."""

    policies: tuple[str, ...]
    resident_state: int
    slots: int
    host_state: int


def budget(hardware: Hardware) -> int:
    """Bytes of the device that a plan may use."""
    return int(hardware.memory * USABLE)


def choose(shape: ModelShape, settings: Settings, hardware: Hardware) -> Choice:
    """The fastest choice that fits comfortably; if none does, the smallest."""
    base = memory.fixed(shape, settings)
    room = int(hardware.memory * COMFORTABLE)

    def peak(choice: Choice) -> int:
        return memory.step_phase(
            shape, settings, base, choice.policies, choice.resident_state, choice.slots
        ).total

    choices = _ladder(shape, settings, hardware)
    for choice in choices:
        if peak(choice) <= room:
            return choice
    return min(choices, key=peak)


def _ladder(shape: ModelShape, settings: Settings, hardware: Hardware) -> list[Choice]:
    """All choices worth trying, from fastest to smallest."""
    state = memory.state_bytes(memory.adapter_parameters(shape, settings), settings.state_bits)
    moves = _policy_moves(shape, settings, hardware)
    if settings.paged and settings.optimizer_resident is None:
        seconds = state / (hardware.bus or UNKNOWN_BUS) / settings.accumulation
        freed = state - memory.slot_bytes(settings)
        if freed > 0:
            moves.append((seconds / freed, "pages"))
    fixed_resident = state if settings.optimizer_resident is None else min(state, settings.optimizer_resident)
    resident = fixed_resident if settings.paged else state
    if settings.activations != "auto":
        policies = [_feasible(settings.activations, settings)] * shape.layers
    else:
        policies = ["none"] * shape.layers
    ladder = [_choice(policies, resident, state, settings)]
    for _, move in sorted(moves):
        if move == "pages":
            resident = 0
            ladder.append(_choice(policies, resident, state, settings))
        elif not settings.fast:  # transformers switches recomputation for the whole model
            policies = [move] * shape.layers
            ladder.append(_choice(policies, resident, state, settings))
        else:
            for layer in range(shape.layers):
                policies[layer] = move
                ladder.append(_choice(policies, resident, state, settings))
    return ladder


def _choice(policies: list[str], resident: int, state: int, settings: Settings) -> Choice:
    slots = memory.slot_bytes(settings) if resident < state else 0
    return Choice(tuple(policies), resident, slots, state - resident)


def _policy_moves(shape: ModelShape, settings: Settings, hardware: Hardware) -> list[tuple[float, str]]:
    """Seconds for each byte that a step from one policy to the next frees, for one token."""
    if settings.activations != "auto":
        return []
    flops = (hardware.flops or UNKNOWN_FLOPS) * reach(settings).flops
    forward = {**forward_flops(shape, settings), "nothing": 0.0}
    moves, before = [], "none"
    for policy in ("mlp", "full") if settings.fast and shape.gated else ("full",):
        freed = saved_bytes(shape, settings, before) - saved_bytes(shape, settings, policy)
        extra = forward[repeated(policy, settings)] - forward[repeated(before, settings)]
        if freed > 0:
            moves.append((extra / flops / freed, policy))
            before = policy
    return moves


def _feasible(policy: str, settings: Settings) -> str:
    """The reference path has two policies; what it lacks becomes the smaller one."""
    return policy if settings.fast or policy == "none" else "full"
