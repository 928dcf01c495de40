"""What an export may cost, what is wrong with one that costs more, and what may help.

In: what `probe` measured of the trained model, the base alone and an export. Out: `Failure`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Nats a token. Exact formats are held to rounding; the others to what 4 bits cost a small model that
# was tuned on text of this kind (their purpose is size, and the table shows what it costs).
BOUNDS = {
    "adapter": 0.01,
    "merged": 0.01,
    "original": 1.0,  # merged onto other weights than were trained against: another model by intent
    "int8": 0.05,
    "gguf": 0.1,
    "gptq": 0.3,
    "awq": 0.3,
    "rtn": 0.5,
    "nf4": 0.5,
}
# The most an export may diverge, as a share of what the base alone does. An absolute bound lets a light
# tuning get lost unseen: it was small to begin with.
KEEPS = {"adapter": 0.1, "merged": 0.1}
KEEPS_AT_LEAST = 0.5
AGAIN = "export again with export.overwrite=true"
_ACCEPT = "accept it with export.max_kl"
_LESS = {  # what brings an export nearer to the model that was trained
    "adapter": "load the base as its card says",
    "merged": "keep more digits with export.dtype=float32",
    "original": "use export.merge_base=trained",
    "gguf": "choose a larger export.gguf_type",
    "gptq": "choose more export.bits, a smaller export.group_size or other text with export.calibration",
    "awq": "choose a smaller export.group_size, gptq with more bits, or other text with export.calibration",
    "rtn": "choose more export.bits, a smaller export.group_size, or gptq",
    "int8": "choose gguf or merged",
    "nf4": "choose int8, gptq or gguf",
}


@dataclass(frozen=True)
class Failure:
    """What is wrong with an export, in a few words, and what may help."""

    text: str
    remedy: str


def judge(
    kind: str,
    measured: Mapping[str, Any],
    trained: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    questions: int,
) -> tuple[Failure, ...]:
    """What is wrong with an export; empty if it passed.

    Args:
        kind: a key of BOUNDS, whose bound is `max_kl` in `measured`.
        questions: how many were asked.
    """
    failures = [Failure(text, AGAIN) for text in _unequal(measured.get("weights"))]
    kl, bound = measured["kl"], measured["max_kl"]
    if not kl <= bound:  # NaN fails too
        text = f"diverges by {nats(kl)} nats a token, over the bound of {bound:g}"
        failures.append(Failure(text, f"{_LESS[kind]}, or {_ACCEPT}"))
    if base is not None and not kl < KEEPS.get(kind, KEEPS_AT_LEAST) * base["kl"]:
        lost = f"by {nats(kl)}, the base alone by {nats(base['kl'])} nats a token"
        failures.append(Failure(f"the tuning is lost: it diverges {lost}", _LESS[kind]))
    if measured["prompt_ids"] != trained["prompt_ids"]:
        failures.append(Failure("turns a conversation into other token ids", AGAIN))
    if differ := measured["texts_differ"]:
        failures.append(Failure(f"turns {differ} of {measured['texts']} rows into other token ids", AGAIN))
    if lost_stops := sorted(set(trained["stop_ids"]) - set(measured["stop_ids"])):
        failures.append(Failure(f"does not stop at the tokens {', '.join(map(str, lost_stops))}", AGAIN))
    if measured["stopped"] < trained["stopped"] - 0.1 * questions:
        text = f"ends {measured['stopped']} of {questions} answers, trained {trained['stopped']}"
        failures.append(Failure(text, _LESS[kind]))
    return tuple(failures)


def _unequal(weights: Mapping[str, Any] | None) -> Iterator[str]:
    """What `equality` found, in words."""
    if weights is None:
        return
    if "error" in weights:
        yield f"cannot be read: {weights['error']}"
        return
    if unequal := weights["unequal"]:
        yield (
            f"{len(unequal)} of {weights['tensors']} tensors are not base + adapter, {unequal[0]} first, "
            f"by up to {weights['largest']:.2g} more than rounding"
        )
    if weights["strays"]:
        yield f"holds what no loader reads: {', '.join(weights['strays'][:3])}"


def nats(kl: float) -> str:
    """A divergence with four decimals, or two digits where those would say nothing; float32 noise is 0."""
    return f"{kl:.1e}" if 1e-7 <= kl < 1e-3 else f"{kl if kl > 1e-7 or kl != kl else 0.0:.4f}"
