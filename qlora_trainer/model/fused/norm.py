"""RMSNorm with the addition of the residual inside, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from qlora_trainer.kernels import Fp8Rows, Operations

from .adapter_columns import Widened


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

    def forward(
        self, operations: Operations, x: Tensor, delta: Tensor | None, out: Tensor,
        e4m3: Fp8Rows | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Writes the norm of x + delta [M, h] into `out`; returns that sum and 1/rms, float32 [M]."""
        return operations.rms_norm(x, delta, self.weight, self.eps, self.offset, out, e4m3)

    def backward(
        self, operations: Operations, dy: Tensor, x: Tensor, rstd: Tensor, residual: Widened | None,
        border: int, e4m3: Fp8Rows | None = None,
    ) -> Widened:  # fmt: skip
        """Gradient of the input x [M, h], plus the residual's (in its place, if its border fits)."""
        out = residual
        if out is None or out.border != border:
            out = Widened.empty(x.shape[0], x.shape[1], border, x)
        beside = None if residual is None else residual.values
        operations.rms_norm_backward(dy, x, rstd, self.weight, self.offset, beside, out.values, e4m3)
        return out.with_e4m3(e4m3)
