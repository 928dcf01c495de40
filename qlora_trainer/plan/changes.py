"""What to set instead when a run does not fit: the three cheapest changes, each with its new peak.

In: shape, settings, hardware. Out: `Change`s. Each is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """First what fits, in the order of what it costs the result; then what comes nearest.

    Where no single change is enough, the first is several together.
    """
    now = decide(shape, settings, hardware).peak
    kinds: dict[str, list[tuple[Change, dict[str, Any]]]] = {}
    for overrides, consequence, fields in _candidates(settings):
        found = decide(shape, replace(settings, **fields), hardware)
        if found.peak < 0.99 * now:
            change = Change(overrides, consequence, found.peak, found.fits)
            kinds.setdefault(overrides.split("=")[0], []).append((change, fields))
    # Of one kind the mildest that fits, else the one that comes nearest.
    best = [
        next((entry for entry in entries if entry[0].fits), min(entries, key=lambda entry: entry[0].peak))
        for entries in kinds.values()
    ]
    fitting = [change for change, _ in best if change.fits]
    nearest = sorted((entry for entry in best if not entry[0].fits), key=lambda entry: entry[0].peak)
    if not fitting and (both := _together(shape, settings, hardware, nearest)):
        fitting = [both]
    return tuple((fitting + [change for change, _ in nearest])[:number])


def _together(
    shape: ModelShape,
    settings: Settings,
    hardware: Hardware,
    helpful: Sequence[tuple[Change, dict[str, Any]]],
) -> Change | None:
    """Changes of which none is enough alone, as many of them as it takes; None if all are not enough."""
    taken: list[Change] = []
    for change, fields in helpful:
        settings = replace(settings, **fields)
        taken.append(change)
        found = decide(shape, settings, hardware)
        if found.fits:
            consequences = dict.fromkeys(change.consequence for change in taken)
            overrides = " ".join(change.overrides for change in taken)
            return Change(overrides, "; ".join(consequences), found.peak, True)
    return None


def _candidates(settings: Settings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Overrides, consequence and changed fields; first what gives the same result, only later."""
    rows = settings.evaluation_rows
    while rows > 1:
        rows //= 2
        yield f"evaluate.batch_size={rows}", "same result", {"evaluation_rows": rows}
    rows = settings.rows
    while rows > 1:
        rows //= 2
        accumulation = settings.accumulation * settings.rows // rows
        yield (
            f"train.per_device_train_batch_size={rows} train.gradient_accumulation_steps={accumulation}",
            "same result",
            {"rows": rows, "accumulation": accumulation},
        )
    if settings.activations != "auto":
        yield "train.activations=auto", "same result, slower", {"activations": "auto"}
    compared = ", not compared with the base at the end" if settings.evaluation_rows else ""
    if settings.offload == "none" and settings.fast and settings.device == "cuda":
        yield "model.offload=embeddings", f"same result{compared}", {"offload": "embeddings"}
    if settings.fp8:
        yield "train.base_gemm=bf16", "closer to float32, slower", {"fp8": False}
    if settings.offload in ("none", "embeddings") and settings.streamable:
        yield "model.offload=layers", f"same result, slower{compared}", {"offload": "layers"}
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
