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

from .adapter_columns import Widened
from .call import Call
from .norm import Norm

SUPERVISED_STEP = 256  # what many supervised positions are rounded up to


@dataclass(frozen=True)
class Supervised:
    """Positions that predict a label. Padding has weight 0.

    rows: int64 [S] into the M tokens; targets: int64 [S]; weights: float32 [S].
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor


CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # of logits at a time


def chunk_rows(vocabulary: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of a chunk of logits: whole tiles of the matrix units, where it has any."""
    rows = max(1, chunk_bytes // (vocabulary * itemsize))
    return rows // 256 * 256 or rows


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
        self.norm, self.weight, self.softcap = norm, weight, softcap
        self.operations, self.border = operations, border
        self.chunk = chunk_rows(weight.shape[0], weight.element_size(), chunk_bytes)

    def __call__(self, x: Tensor, delta: Tensor | None, supervised: Supervised, call: Call) -> Tensor:
        """Cross-entropy of each supervised position, float32 [S], of the stream x + delta [M, h]."""
        return _HeadFunction.apply(x, delta, self, supervised, call)

    def nll(self, x: Tensor, delta: Tensor | None, s: Supervised, grad: Tensor | None) -> Tensor:
        """float32 [S] of the stream x + delta [M, h]; fills `grad` [S, h] of those rows, if given."""
        found = []
        for start in range(0, len(s.rows), self.chunk):
            part = slice(start, start + self.chunk)
            into = None if grad is None else grad[part]
            found.append(self._chunk_nll(x, delta, s.rows[part], s.targets[part], into))
        return torch.cat(found).float()

    def _chunk_nll(
        self, x: Tensor, delta: Tensor | None, rows: Tensor, targets: Tensor, grad: Tensor | None
    ) -> Tensor:
        """Of some supervised rows; their logits live no longer."""
        norm, operations = self.norm, self.operations
        x = x.index_select(0, rows)
        delta = None if delta is None else delta.index_select(0, rows)
        normed = torch.empty_like(x)
        total, rstd = operations.rms_norm(x, delta, norm.weight, norm.eps, norm.offset, normed)
        logits = normed @ self.weight.T
        nll = operations.cross_entropy_(logits, targets, self.softcap)
        if grad is not None:
            torch.mm(logits, self.weight, out=grad)
            operations.rms_norm_backward(grad, total, rstd, norm.weight, norm.offset, None, grad)
        return nll


class _HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, head: FusedHead, s: Supervised, call: Call
    ) -> Tensor:
        if not any(ctx.needs_input_grad):
            return head.nll(x, delta, s, None)
        ctx.grad = x.new_empty((len(s.rows), x.shape[1]))
        ctx.rows, ctx.shape, ctx.border, ctx.call = s.rows, x.shape, head.border, call
        return head.nll(x, delta, s, ctx.grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_nll: Tensor) -> Any:
        """d_nll: float32 [S], what the objective makes of each position."""
        m, h = ctx.shape
        wide = Widened(ctx.grad.new_zeros((m, h + ctx.border)), h)
        # padding repeats row 0 with a zero gradient, so rows are added, not assigned
        wide.values.index_add_(0, ctx.rows, ctx.grad.mul_(d_nll[:, None]))
        ctx.grad = None
        dx = ctx.call.hand(wide)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None


class ModuleHead:
    """The model's own norm and LM head, for a head that is trained, adapted or quantized."""

    def __init__(
        self, norm: nn.Module, lm_head: nn.Module, softcap: float | None, vocabulary: int, chunk_bytes: int
    ) -> None:
        self.norm, self.lm_head, self.softcap = norm, lm_head, softcap
        self.chunk = max(1, chunk_bytes // (4 * vocabulary))

    def _chunk_nll(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(self.norm(x))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def __call__(self, x: Tensor, delta: Tensor | None, s: Supervised, call: Call) -> Tensor:
        """As `FusedHead`."""
        x = x.index_select(0, s.rows)
        if delta is not None:
            x = x + delta.index_select(0, s.rows)
        return torch.cat(
            [
                checkpoint(self._chunk_nll, rows, targets, use_reentrant=False)
                for rows, targets in zip(x.split(self.chunk), s.targets.split(self.chunk), strict=True)
            ]
        )


@dataclass(frozen=True)
class HeadSize:
    """What `FusedHead` needs, in bytes: of a chunk its logits, and rows gathered (stream and addition) and
    normed; trained, the gradient of all rows."""

    hidden: int
    vocabulary: int
    dtype_bytes: int
    chunk_bytes: int

    def work(self, tokens: int, supervised: int, *, backward: bool) -> int:
        s, h, v = self.dtype_bytes, self.hidden, self.vocabulary
        n = -(-supervised // SUPERVISED_STEP) * SUPERVISED_STEP
        rows = min(n, chunk_rows(v, s, self.chunk_bytes))
        streams = 1 if backward else 2  # trained, x is the last layer's to count
        return rows * s * (v + 3 * h) + (n * h * s if backward else 0) + streams * tokens * h * s
