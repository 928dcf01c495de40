"""What a model is made of, as plain values: the description that the plan and the run share.

`describe` reads it off modules, with weights or without; `bind` gives it its weights. Two models that run
alike have equal descriptions. What the fast path does not compute is `Declined`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Declined:
    """Runs on the reference path; `why` is one line."""

    why: str


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over `size` features; the factor is weight + offset."""

    path: str
    size: int
    eps: float
    offset: float


@dataclass(frozen=True)
class AdapterSpec:
    rank: int
    scaling: float
    dropout: float


@dataclass(frozen=True)
class LinearSpec:
    """A frozen product [n, k] with or without an adapter; `path` is that of its module in the layer."""

    path: str
    n: int
    k: int
    four_bit: bool
    bias: bool
    adapter: AdapterSpec | None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class GroupSpec:
    """Products of one input that run as one."""

    members: tuple[LinearSpec, ...]

    @property
    def name(self) -> str:
        return "+".join(member.name for member in self.members)

    @property
    def n(self) -> int:
        return sum(member.n for member in self.members)

    @property
    def k(self) -> int:
        return self.members[0].k

    @property
    def rank(self) -> int:
        """Of all its adapters together."""
        return sum(member.adapter.rank for member in self.members if member.adapter is not None)


@dataclass(frozen=True)
class LayerSpec:
    """A pre-norm decoder layer with grouped projections.

    heads: (query heads, key heads, head width). window: keys a query sees, None for all.
    attention_output_norm and mlp_output_norm: norms between a branch and the residual (Gemma 2, 3).
    """

    input_norm: NormSpec
    qkv: GroupSpec
    head_norms: tuple[NormSpec, NormSpec] | None
    heads: tuple[int, int, int]
    softmax_scale: float
    window: int | None
    layer_type: str | None
    o: GroupSpec
    attention_output_norm: NormSpec | None
    mlp_norm: NormSpec
    gate_up: GroupSpec
    down: GroupSpec
    activation: str  # "silu" or "gelu_tanh"
    mlp_output_norm: NormSpec | None

    @property
    def groups(self) -> dict[str, GroupSpec]:
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}


@dataclass(frozen=True)
class HeadSpec:
    """Final norm and LM head [vocabulary, hidden], frozen, without a bias."""

    norm: NormSpec
    vocabulary: int
    softcap: float | None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder on the fast path, as far as it goes.

    declined: nothing of the model is on it; then `layers` is empty and `head` says the same.
    """

    layers: tuple[LayerSpec | Declined, ...]
    head: HeadSpec | Declined
    declined: Declined | None = None

    @property
    def reference_because(self) -> str | None:
        """Why not all layers are on the fast path; None where they are. The head does not count."""
        if self.declined is not None:
            return self.declined.why
        reasons = [layer.why for layer in self.layers if isinstance(layer, Declined)]
        return reasons[0] if reasons else None

    @property
    def head_because(self) -> str | None:
        """Why the head is not on it though layers are; None otherwise."""
        return self.head.why if self.declined is None and isinstance(self.head, Declined) else None

    def modules(self, fused: Callable[[int], str]) -> dict[str, str]:
        """Name -> one line on how it runs; `fused` gives the line of a layer on the fast path."""
        if self.declined is not None:
            return {"model": f"reference: {self.declined.why}"}
        lines = {
            f"layers.{i}": f"reference: {layer.why}" if isinstance(layer, Declined) else fused(i)
            for i, layer in enumerate(self.layers)
        }
        head = "fused: norm, logits and cross-entropy of supervised positions in chunks"
        if isinstance(self.head, Declined):
            head = f"reference in chunks: {self.head.why}"
        return lines | {"lm_head": head}


def drawn_together(lines: dict[str, str]) -> list[str]:
    """`name: line`; equal lines of neighbours are one (`layers.0 … layers.31: fused`)."""
    result = []
    for line, group in groupby(lines.items(), key=lambda item: item[1]):
        names = [name for name, _ in group]
        result.append(f"{names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}: {line}")
    return result
