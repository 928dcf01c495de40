"""What to set instead when a run does not fit: the three cheapest changes, each with its new peak.

In: the configuration, the machine, the model, the data. Out: `Change`s; each is the plan of the changed
configuration, so what a change entails (another path, other policies) is in its peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_trainer.config.frozen import with_values
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.plan import settings as settings_module
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.decide import Decision, decide
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.memory import context
from qlora_trainer.plan.settings import DataFacts, Settings

SHORTEST = 128  # tokens: no shorter documents are proposed
ROUNDS = 5  # changes that are proposed together at most
Values = dict[str, Any]  # key -> value


@dataclass(frozen=True)
class Change:
    """Keys to set, what that does to the result, and the peak in bytes that it gives."""

    overrides: str
    consequence: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class _Tried:
    """Several changes, with what was decided for all of them together."""

    values: Values
    consequences: tuple[str, ...]
    found: Decision

    def change(self) -> Change:
        overrides = " ".join(f"{key}={_text(value)}" for key, value in self.values.items())
        consequences = dict.fromkeys(self.consequences)
        return Change(overrides, "; ".join(consequences), self.found.peak, self.found.fits)


def cheapest(
    config: RunConfig,
    hardware: Hardware,
    architecture: Architecture,
    data: DataFacts | None = None,
    world_size: int = 1,
    rows: int | None = None,
    number: int = 3,
) -> tuple[Change, ...]:
    """First what fits, in the order of what it costs the result; then what comes nearest.

    Where no single change is enough, the first is several together.
    """

    def plan(values: Values) -> Decision:
        changed = with_values(config, values)
        shape = architecture.shape(changed, hardware.device)
        asked = settings_module.from_config(changed, hardware, shape, data, world_size, rows)
        return decide(shape, asked, hardware)

    best = _best(_Tried({}, (), plan({})), plan)
    fitting = [tried for tried in best if tried.found.fits]
    nearest = sorted((tried for tried in best if not tried.found.fits), key=lambda tried: tried.found.peak)
    if not fitting and nearest:
        fitting = _together(nearest[0], plan)
    return tuple(tried.change() for tried in (fitting + nearest)[:number])


def _together(start: _Tried, plan: Callable[[Values], Decision]) -> list[_Tried]:
    """`start` and what helps most after it, and so on until it fits; none if it never does."""
    for _ in range(ROUNDS - 1):
        best = _best(start, plan)
        if fitting := [tried for tried in best if tried.found.fits]:
            return fitting[:1]
        if not best:
            return []
        start = min(best, key=lambda tried: tried.found.peak)
    return []


def _best(start: _Tried, plan: Callable[[Values], Decision]) -> list[_Tried]:
    """What helps `start`, by what it costs; of one kind the mildest that fits, else what comes nearest."""
    kinds: dict[str, list[_Tried]] = {}
    always = context(start.found.settings)
    for values, consequence in _candidates(start.found.settings):
        try:
            found = plan(start.values | values)
        except ConfigError:  # a base that is stored quantized stays as it is
            continue
        if found.peak - always < 0.99 * (start.found.peak - always):
            tried = _Tried(start.values | values, (*start.consequences, consequence), found)
            kinds.setdefault(next(iter(values)), []).append(tried)
    return [
        next((tried for tried in kind if tried.found.fits), min(kind, key=lambda tried: tried.found.peak))
        for kind in kinds.values()
    ]


def _candidates(settings: Settings) -> Iterator[tuple[Values, str]]:
    """Keys to set and the consequence; first what gives the same result, only later."""
    rows = settings.evaluation_rows
    while rows > 1:
        rows //= 2
        yield {"evaluate.batch_size": rows}, "same result"
    rows = settings.rows
    while rows > 1:
        rows //= 2
        accumulation = settings.accumulation * settings.rows // rows
        yield (
            {"train.per_device_train_batch_size": rows, "train.gradient_accumulation_steps": accumulation},
            "same result",
        )
    if settings.activations != "auto":
        yield {"train.activations": "auto"}, "same result, slower"
    compared = ", not compared with the base at the end" if settings.evaluation_rows else ""
    if settings.offload == "none" and settings.fast and settings.device == "cuda":
        yield {"model.offload": "embeddings"}, f"same result{compared}"
    if settings.fp8:
        yield {"train.base_gemm": "bf16"}, "closer to float32, slower"
    if settings.offload in ("none", "embeddings") and settings.streamable:
        yield {"model.offload": "layers"}, f"same result, slower{compared}"
    if settings.reference_because == "model.kernels=reference":
        yield {"model.kernels": "auto"}, "same result to rounding, faster"
    if settings.device == "cuda" and not settings.paged:
        yield {"optim.name": f"paged_adamw_{settings.state_bits}bit"}, "same result"
    if settings.paged and settings.optimizer_resident:
        yield {"optim.resident_gib": 0}, "same result, slower"
    if settings.method in ("nf4", "fp4") and not settings.double_quant:
        yield {"quantization.bnb_4bit_use_double_quant": True}, "scales in 8 bits"
    if settings.method in ("none", "int8"):
        yield {"quantization.method": "nf4"}, "4-bit base"
    if settings.device == "cuda" and settings.state_bits == 32 and not settings.paged:
        yield {"optim.name": "adamw_8bit"}, "moments in 8 bits"
    for divisor in (2, 4, 8):
        if (length := settings.length // divisor) >= SHORTEST:
            yield {"train.max_length": length}, "longer documents are cut"
    for divisor in (2, 4, 8):
        if (r := settings.r // divisor) >= 4:
            yield {"lora.r": r}, "smaller adapter"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
