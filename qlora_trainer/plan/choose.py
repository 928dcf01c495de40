"""The fastest mix of activation policies and resident optimizer pages that the memory holds.

In: shape, settings, hardware. Out: `Choice`. Every layer starts with nothing recomputed and all
optimizer state on the device; what costs the fewest seconds for each byte it frees goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from qlora_trainer.plan import memory
from qlora_trainer.plan.fast_path import FastPath
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.reference_path import ReferencePath
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape
from qlora_trainer.plan.speed import busy_from, micro_batch_seconds, optimizer_seconds, repeated_work

USABLE = 0.97  # of the device: the rest goes to fragmentation
COMFORTABLE = 0.92  # of the device: with the margin by which the plan may be wrong left free
ABOUT = 1.01  # times the smallest: not worth a slower mix
HOST_SHARE = 0.7  # of the host's memory that activations may be pinned in
UNKNOWN_FLOPS, UNKNOWN_BUS = 100e12, 25e9  # of a card that is not known, to weigh one against the other


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


def assumed(hardware: Hardware) -> Hardware:
    """`hardware` with a speed, to weigh one way against another where its own is not known."""
    return hardware if hardware.flops else replace(hardware, flops=UNKNOWN_FLOPS, bus=UNKNOWN_BUS)


def choose(shape: ModelShape, settings: Settings, hardware: Hardware) -> Choice:
    """The fastest choice that fits comfortably; if none does, the fastest of about the smallest."""
    assert settings.offload != "auto", "`decide` settles it"
    base, path = memory.fixed(shape, settings), memory.path_of(shape, settings)
    room = int(hardware.memory * COMFORTABLE)
    ways = [_mixes(path, shape, settings, order) for order in _orders(path, shape, settings)]
    if hardware.host_memory is not None:
        pinned = HOST_SHARE * hardware.host_memory
        ways = [[mix for mix in way if sum(path.on_host(p) for p in mix) <= pinned] or way for way in ways]

    def step(choice: Choice) -> memory.Phase:
        return memory.step_phase(path, settings, base, choice.policies, choice.state)

    def seconds(choice: Choice) -> float:
        known = assumed(hardware)
        micro = micro_batch_seconds(shape, settings, known, choice.policies)
        update = optimizer_seconds(shape, settings, known, choice.host_state)
        assert micro is not None and update is not None
        return micro * settings.accumulation + update

    def evaluation(choice: Choice) -> int:
        if not settings.evaluation_rows:
            return 0
        phases = [memory.evaluation_phase(path, settings, base, choice.state)]
        if settings.offload == "none":
            phases.append(memory.comparison_phase(path, settings, base, choice.state))
        return max(phase.total for phase in phases)

    for evaluated in (evaluation, lambda choice: 0):  # what evaluation alone forbids, no policy mends
        fitting = []
        for resident, mixes in product(_residencies(shape, settings), ways):
            choices = [_choice(mix, resident, shape, settings) for mix in mixes]
            found = next((choice for choice in choices if step(choice).total <= room), None)
            if found is not None and (after := evaluated(found)) <= budget(hardware):
                left = min(room - step(found).total, budget(hardware) - after)
                fitting.append(_fill(found, step(found), left, path, settings))
        if fitting:
            return min(fitting, key=seconds)
    least = min(_residencies(shape, settings))
    smallest = [_choice(mix, least, shape, settings) for mixes in ways for mix in mixes]
    totals = [step(choice).total for choice in smallest]
    near = max(min(totals), min(min(totals) * ABOUT, budget(hardware)))
    return min((choice for choice, total in zip(smallest, totals, strict=True) if total <= near), key=seconds)


def graph_memory(shape: ModelShape, settings: Settings, step: memory.Phase) -> int:
    """What CUDA graphs hold on to: the first pass over each further shape cannot use it."""
    if not captures(shape, settings):
        return 0
    largest = min(settings.tokens, busy_from(shape))
    return (step.parts["activations"] + step.parts["logits"]) * largest // settings.tokens


def captures(shape: ModelShape, settings: Settings) -> bool:
    """Whether CUDA graphs serve the average micro-batch, if there is room for them.

    Streamed layers cannot be captured: what their slots hold differs from pass to pass.
    """
    if settings.device == "cpu" or not settings.fast or settings.offload == "layers":
        return False
    return settings.rows * settings.mean_length < busy_from(shape)


def _fill(
    choice: Choice, step: memory.Phase, left: int, path: FastPath | ReferencePath, settings: Settings
) -> Choice:
    """Use what is left: for pages; where nothing is recomputed for graphs, then dequantized weights."""
    if settings.paged and settings.optimizer_resident is None and choice.host_state:
        kept = min(left, choice.host_state)
        return replace(choice, resident_state=kept, host_state=choice.host_state - kept)
    if settings.fp8:
        return choice  # its copies are there already
    if settings.device == "cpu" and isinstance(path, FastPath):
        return replace(choice, dequantized=min(left, path.dequantized()))
    if not isinstance(path, FastPath) or set(choice.policies) != {"none"}:
        return choice
    if settings.offload == "layers" or settings.method == "none":
        return choice
    graphs = graph_memory(path.shape, settings, step)
    if left > graphs:
        left -= graphs
    return replace(choice, dequantized=min(left, path.dequantized()))


def _residencies(shape: ModelShape, settings: Settings) -> list[int]:
    """Optimizer bytes on the device that are worth trying: all, or none where pages may leave."""
    state = _state(shape, settings)
    if not settings.paged:
        return [state]
    if settings.optimizer_resident is not None:
        return [min(state, settings.optimizer_resident)]
    return [state, 0]


def _state(shape: ModelShape, settings: Settings) -> int:
    return memory.state_bytes(memory.adapter_parameters(shape, settings), settings.state_bits)


def _choice(policies: tuple[str, ...], resident: int, shape: ModelShape, settings: Settings) -> Choice:
    state = _state(shape, settings)
    slots = memory.slot_bytes(settings) if resident < state else 0
    return Choice(policies, resident, state - resident, slots)


def _mixes(
    path: FastPath | ReferencePath, shape: ModelShape, settings: Settings, order: list[str]
) -> list[tuple[str, ...]]:
    """Policies of all layers, from the largest mix to the smallest; lower layers change first."""
    policies = [order[0]] * shape.layers
    mixes = [tuple(policies)]
    for policy in order[1:]:
        if not settings.fast:  # transformers recomputes in all layers or in none
            mixes.append((policy,) * shape.layers)
            continue
        for layer in range(shape.layers):
            policies[layer] = policy
            mixes.append(tuple(policies))
    return mixes


def _orders(path: FastPath | ReferencePath, shape: ModelShape, settings: Settings) -> list[list[str]]:
    """Policies in the orders in which layers may take them: first by the work for each byte freed, then
    what takes the bus and host memory, either a little of them or less of the device's time."""
    if settings.activations != "auto":
        known = settings.activations in path.policies
        return [[settings.activations if known else "full"]]

    def price(before: str, after: str) -> float:
        work = [repeated_work(shape, settings, path.repeats(policy)) for policy in (after, before)]
        return (work[0] - work[1]) / (path.kept(before) - path.kept(after))

    first = ["none"]
    # what lies above the line from one end to the other is never worth it
    if "mlp" in path.policies and price("none", "mlp") <= price("none", "full"):
        first.append("mlp")
    first.append("full")
    hosts = [policy for policy in ("full_offload", "offload") if path.on_host(policy)]
    return [[*first, policy] for policy in hosts] or [first]
