"""What a decoder layer computes with: the description of `spec`, bound to its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from qlora_trainer.kernels import HeadNorm

from .projection import Projection


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the hidden size; the factor is weight + offset."""

    weight: Tensor  # [h]
    eps: float
    offset: float

    @cached_property
    def factor(self) -> Tensor:
        """float32 [h]."""
        return self.weight.float() + self.offset


@dataclass(frozen=True)
class LayerParts:
    """A pre-norm decoder layer with grouped projections.

    heads: (query heads, key heads, head width). window: keys a query sees, None for all.
    attention_output_norm and mlp_output_norm: norms between a branch and the residual (Gemma 2, 3).
    """

    name: str
    input_norm: Norm
    qkv: Projection
    qkv_bias: Tensor | None
    head_norms: tuple[HeadNorm, HeadNorm] | None
    heads: tuple[int, int, int]
    softmax_scale: float
    window: int | None
    layer_type: str | None
    o: Projection
    attention_output_norm: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    activation: str  # "silu" or "gelu_tanh"
    mlp_output_norm: Norm | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for projection in self.projections for p in projection.parameters]
