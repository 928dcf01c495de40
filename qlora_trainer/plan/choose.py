"""The fastest mix of activation policies and resident optimizer pages that the memory holds.

In: shape, settings, hardware. Out: `Choice`. Every layer starts with nothing recomputed and all
optimizer state on the device; what costs the fewest seconds for each byte it frees goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_trainer.plan import memory
from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.reference_path import ReferencePath
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape
from qlora_trainer.plan.speed import reach, repeated_work

USABLE = 0.97  # of the device: the rest goes to fragmentation
COMFORTABLE = 0.92  # of the device: with the margin by which the plan may be wrong left free
UNKNOWN_FLOPS, UNKNOWN_BUS = 100e12, 25e9  # only their ratio matters here


@dataclass(frozen=True)
class Choice:
    """What the plan decides, in bytes where it is a size.

    Attributes:
        policies: activation policy of every layer.
        resident_state, host_state: optimizer pages on the device and on the host.
        slots: device room that travelling pages need.
        dequantized: 16-bit copies of base weights that stay on the device because there is room.
    """

    policies: tuple[str, ...]
    resident_state: int
    host_state: int
    slots: int
    dequantized: int = 0

    @property
    def state(self) -> int:
        """Optimizer bytes on the device."""
        return self.resident_state + self.slots


def budget(hardware: Hardware) -> int:
    """Bytes of the device that a plan may use."""
    return int(hardware.memory * USABLE)


def settle(shape: ModelShape, settings: Settings, hardware: Hardware) -> Settings:
    """`offload=auto` becomes `layers` where nothing else fits, on the path that can stream them."""
    if settings.offload != "auto":
        return settings
    stay = replace(settings, offload="none")
    if not settings.fast or settings.method not in ("nf4", "fp4"):
        return stay
    choice = choose(shape, stay, hardware)
    phases = memory.phases(shape, stay, choice.policies, choice.state, choice.dequantized)
    fits = max(phase.total for phase in phases) <= budget(hardware)
    return stay if fits else replace(settings, offload="layers")


def choose(shape: ModelShape, settings: Settings, hardware: Hardware) -> Choice:
    """The fastest choice that fits comfortably; if none does, the smallest."""
    assert settings.offload != "auto", "settle comes first"
    base = memory.fixed(shape, settings)
    room = int(hardware.memory * COMFORTABLE)

    def peak(choice: Choice) -> int:
        return memory.step_phase(
            shape, settings, base, choice.policies, choice.state, choice.dequantized
        ).total

    choices = _ladder(shape, settings, hardware)
    for choice in choices:
        if (need := peak(choice)) <= room:
            return replace(choice, dequantized=_dequantized(shape, settings, choice, room - need))
    return min(choices, key=peak)


def _dequantized(shape: ModelShape, settings: Settings, choice: Choice, room: int) -> int:
    """Room that is left when nothing is recomputed saves the dequantization of as many weights."""
    path = memory.path_of(shape, settings)
    if not isinstance(path, FastPath) or set(choice.policies) != {"none"} or settings.method == "none":
        return 0
    if settings.offload == "layers":
        return 0
    return min(room, path.dequantized())


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
        policies = [_feasible(settings.activations, memory.path_of(shape, settings))] * shape.layers
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
    return Choice(tuple(policies), resident, state - resident, slots)


def _policy_moves(shape: ModelShape, settings: Settings, hardware: Hardware) -> list[tuple[float, str]]:
    """Steps from `none` to smaller policies, each with its seconds for each byte that it frees."""
    if settings.activations != "auto":
        return []
    path = memory.path_of(shape, settings)
    flops = (hardware.flops or UNKNOWN_FLOPS) * reach(settings).flops

    def step(before: str, after: str) -> tuple[float, str]:
        extra = [repeated_work(shape, settings, path.repeats(policy)) for policy in (after, before)]
        freed = path.kept(before) - path.kept(after)
        return settings.tokens * (extra[0] - extra[1]) / flops / freed, after

    straight = step("none", "full")
    if "mlp" not in path.policies or step("none", "mlp") > straight:
        return [straight]  # what lies above the line from one end to the other is never worth it
    return [step("none", "mlp"), step("mlp", "full")]


def _feasible(policy: str, path: FastPath | ReferencePath) -> str:
    """What a path lacks becomes its smallest policy."""
    return policy if policy in path.policies else path.policies[-1]
