"""Final norm, LM head and cross-entropy of the supervised positions, a chunk of logits at a time.

The gradient of the hidden states is made in the forward pass, while the chunk's logits exist: the
head costs 4·V·h FLOPs a supervised token, not 6, whole logits never exist, and tokens without a
label cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer.kernels import Operations

from .parts import Norm


@dataclass(frozen=True)
class Supervised:
    """Positions that predict a label. Padding has weight 0.

    rows: int64 [S] into the M tokens; targets: int64 [S]; weights: float32 [S].
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor


class FusedHead:
    """weight [V, h] frozen, no bias; `border`: spare columns of the gradient it hands down."""

    def __init__(
        self,
        norm: Norm,
        weight: Tensor,
        softcap: float | None,
        operations: Operations,
        chunk_bytes: int,
        border: int,
    ) -> None:
        self.norm, self.weight, self.softcap, self.operations, self.border = (
            norm,
            weight,
            softcap,
            operations,
            border,
        )
        rows = max(1, chunk_bytes // (weight.shape[0] * weight.element_size()))
        self.chunk = rows // 256 * 256 or rows  # whole tiles of the matrix units

    def __call__(self, x: Tensor, delta: Tensor | None, supervised: Supervised) -> Tensor:
        """Sum of weights·cross-entropy, float32 scalar, of the stream x + delta [M, h]."""
        return _HeadFunction.apply(x, delta, self, supervised)

    def loss(self, x: Tensor, delta: Tensor | None, s: Supervised, grad: Tensor | None) -> Tensor:
        """Loss sum of the stream x + delta [M, h]; fills `grad` [S, h] of its supervised rows, if given."""
        losses = []
        for start in range(0, len(s.rows), self.chunk):
            part = slice(start, start + self.chunk)
            rows, targets, weights = s.rows[part], s.targets[part], s.weights[part]
            into = None if grad is None else grad[part]
            losses.append(self._chunk_loss(x, delta, rows, targets, weights, into))
        return torch.cat(losses).sum().float()

    def _chunk_loss(
        self,
        x: Tensor,
        delta: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor,
        grad: Tensor | None,
    ) -> Tensor:
        """Weighted losses of some supervised rows; their logits live no longer."""
        norm, operations = self.norm, self.operations
        x = x.index_select(0, rows)
        delta = None if delta is None else delta.index_select(0, rows)
        normed = torch.empty_like(x)
        total, rstd = operations.rms_norm(x, delta, norm.weight, norm.eps, norm.offset, normed)
        logits = normed @ self.weight.T
        losses = operations.cross_entropy_(logits, targets, weights, self.softcap)
        if grad is not None:
            torch.mm(logits, self.weight, out=grad)
            operations.rms_norm_backward(grad, total, rstd, norm.weight, norm.offset, None, grad)
        return losses


class _HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, head: FusedHead, s: Supervised) -> Tensor:
        m, h = x.shape
        if not any(ctx.needs_input_grad):
            return head.loss(x, delta, s, None)
        ctx.grad = x.new_empty((len(s.rows), h))
        ctx.rows, ctx.shape, ctx.border = s.rows, (m, h), head.border
        return head.loss(x, delta, s, ctx.grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        m, h = ctx.shape
        wide = ctx.grad.new_zeros((m, h + ctx.border))
        # padding repeats row 0 with a zero gradient, so rows are added, not assigned
        wide[:, :h].index_add_(0, ctx.rows, ctx.grad.mul_(grad.to(ctx.grad.dtype)))
        ctx.grad = None
        dx = wide[:, :h]
        return dx, dx if ctx.needs_input_grad[1] else None, None, None


class ModuleHead:
    """The model's own norm and LM head, for a head that is trained, adapted or quantized."""

    def __init__(
        self, norm: nn.Module, lm_head: nn.Module, softcap: float | None, vocabulary: int, chunk_bytes: int
    ) -> None:
        self.norm, self.lm_head, self.softcap = norm, lm_head, softcap
        self.chunk = max(1, chunk_bytes // (4 * vocabulary))

    def _chunk_loss(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(x))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()

    def __call__(self, x: Tensor, delta: Tensor | None, s: Supervised) -> Tensor:
        x = x.index_select(0, s.rows)
        if delta is not None:
            x = x + delta.index_select(0, s.rows)
        total = x.new_zeros((), dtype=torch.float32)
        for start in range(0, x.shape[0], self.chunk):
            rows = slice(start, start + self.chunk)
            total = total + checkpoint(
                self._chunk_loss, x[rows], s.targets[rows], s.weights[rows], use_reentrant=False
            )
        return total
