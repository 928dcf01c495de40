"""What the plan decides for given settings, and what follows: offload, policies, pages, graphs, seconds.

In: shape, settings, hardware. Out: a `Decision`. `plan.py` reports it, `changes.py` compares it with that of
changed settings, `micro_batch.py` with that of other micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_trainer.plan import memory
from qlora_trainer.plan.choose import Choice, budget, captures, choose, graph_memory
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape
from qlora_trainer.plan.speed import micro_batch_seconds, optimizer_seconds


@dataclass(frozen=True)
class Decision:
    """`settings` with `offload` settled; `room`: bytes that may be used; `seconds`: of an optimizer step."""

    settings: Settings
    choice: Choice
    phases: tuple[memory.Phase, ...]
    graphs: bool
    seconds: float | None
    room: int

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.room


def decide(shape: ModelShape, asked: Settings, hardware: Hardware) -> Decision:
    """`offload=auto` becomes the first of none, embeddings, layers that fits, on the path that has them."""
    if asked.offload != "auto":
        return _decide(shape, asked, hardware)
    ways = ["none"]
    if asked.fast:
        ways += ["embeddings"] if shape.head and asked.device == "cuda" else []
        ways += ["layers"] if asked.streamable else []
    for way in ways:
        found = _decide(shape, replace(asked, offload=way), hardware)
        if found.fits:
            break
    return found


def _decide(shape: ModelShape, settings: Settings, hardware: Hardware) -> Decision:
    choice, room = choose(shape, settings, hardware), budget(hardware)
    phases = memory.phases(shape, settings, choice.policies, choice.state, choice.dequantized)
    graphs = _graphs(shape, settings, phases, room)
    if graphs:
        phases = memory.captured(phases)
    micro = micro_batch_seconds(shape, settings, hardware, choice.policies, choice.dequantized, graphs)
    update = optimizer_seconds(shape, settings, hardware, choice.host_state)
    seconds = None if micro is None or update is None else micro * settings.accumulation + update
    return Decision(settings, choice, phases, graphs, seconds, room)


def _graphs(shape: ModelShape, settings: Settings, phases: tuple[memory.Phase, ...], room: int) -> bool:
    if not captures(shape, settings):
        return False
    step = next(phase for phase in phases if phase.name == "step")
    return step.total + graph_memory(shape, settings, step) + memory.CAPTURED_WORKSPACE <= room
