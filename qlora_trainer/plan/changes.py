"""What to set instead when a run does not fit: the three cheapest changes, each with its new peak.

In: shape, settings, hardware. Out: `Change`s. Each is one change to the run as asked for, planned anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.plan.decide import decide
from qlora_trainer.plan.hardware import Hardware
from qlora_trainer.plan.settings import Settings
from qlora_trainer.plan.shapes import ModelShape

SHORTEST = 128  # tokens: no shorter documents are proposed


@dataclass(frozen=True)
class Change:
    """Keys to set, what that does to the result, and the peak in bytes that it gives."""

    overrides: str
    consequence: str
    peak: int
    fits: bool


def cheapest(
    shape: ModelShape, settings: Settings, hardware: Hardware, number: int = 3
) -> tuple[Change, ...]:
    """First what fits, in the order of what it costs the result; then what comes nearest."""

    now = decide(shape, settings, hardware).peak
    kinds: dict[str, list[Change]] = {}
    for overrides, consequence, fields in _candidates(settings):
        found = decide(shape, replace(settings, **fields), hardware)
        if found.peak < 0.99 * now:
            change = Change(overrides, consequence, found.peak, found.fits)
            kinds.setdefault(overrides.split("=")[0], []).append(change)
    # Of one kind the mildest that fits, else the one that comes nearest.
    best = [
        next((change for change in changes if change.fits), min(changes, key=lambda change: change.peak))
        for changes in kinds.values()
    ]
    fitting = [change for change in best if change.fits]
    nearest = sorted((change for change in best if not change.fits), key=lambda change: change.peak)
    return tuple((fitting + nearest)[:number])


def _candidates(settings: Settings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Overrides, consequence and changed fields; first what gives the same result, only later."""
    if settings.evaluation_rows > 1:
        yield "evaluate.batch_size=1", "same result", {"evaluation_rows": 1}
    rows = settings.rows
    while rows > 1:
        rows //= 2
        accumulation = settings.accumulation * settings.rows // rows
        yield (
            f"train.per_device_train_batch_size={rows} train.gradient_accumulation_steps={accumulation}",
            "same result",
            {"rows": rows, "accumulation": accumulation},
        )
    if settings.activations not in ("auto", "full"):
        yield "train.activations=full", "same result, slower", {"activations": "full"}
    if settings.offload == "none" and settings.fast:
        yield "model.offload=embeddings", "same result", {"offload": "embeddings"}
    if settings.fp8:
        yield "train.base_gemm=bf16", "closer to float32, slower", {"fp8": False}
    if settings.offload in ("none", "embeddings") and settings.streamable:
        yield "model.offload=layers", "same result, slower", {"offload": "layers"}
    if settings.reference_because == "model.kernels=reference":
        yield "model.kernels=auto", "same result to rounding, faster", {"reference_because": None}
    if (settings.reference_because or "").startswith("lora.lora_dropout"):
        yield "lora.lora_dropout=0", "no dropout, faster", {"reference_because": None}
    if settings.device == "cuda" and not settings.paged:
        bits = settings.state_bits
        yield f"optim.name=paged_adamw_{bits}bit", "same result", {"paged": True, "managed": False}
    if settings.paged and settings.optimizer_resident:
        yield "optim.resident_gib=0", "same result, slower", {"optimizer_resident": 0}
    if settings.method in ("nf4", "fp4") and not settings.double_quant:
        yield (
            "quantization.bnb_4bit_use_double_quant=true",
            "scales in 8 bits",
            {"double_quant": True},
        )
    if settings.method in ("none", "int8"):
        yield "quantization.method=nf4", "4-bit base", {"method": "nf4", "double_quant": True}
    if settings.device == "cuda" and settings.state_bits == 32 and not settings.paged:
        yield "optim.name=adamw_8bit", "moments in 8 bits", {"state_bits": 8, "managed": False}
    for divisor in (2, 4, 8):
        if (length := settings.length // divisor) >= SHORTEST:
            shorter = {"length": length, "mean_length": min(settings.mean_length, length)}
            yield f"train.max_length={length}", "longer documents are cut", shorter
    for divisor in (2, 4, 8):
        if (r := settings.r // divisor) >= 4:
            yield f"lora.r={r}", "smaller adapter", {"r": r}
