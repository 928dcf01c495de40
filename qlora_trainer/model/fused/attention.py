"""The attention block: norm, q/k/v, rotation, attention, output projection; forward, backward, and its bytes.

Comes in: the residual stream as (x, delta), whose sum is meant. Goes out: the branch's output, which the
next block's norm adds. Backward: the gradient of the sum, in whose place the branch's is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora_trainer.kernels import HeadNorm, Operations
from qlora_trainer.kernels.attention import State, accumulation_parts, attend, attend_backward, copies

from .activations import RECOMPUTED, Saved
from .adapter_columns import Widened
from .call import Call
from .norm import Norm
from .projection import Gradients, ProductSize, Projection


@dataclass(frozen=True)
class AttentionParts:
    """What the block is made of.

    heads: (query heads, key heads, head width). window: keys a query sees, None for all.
    output_norm: a norm between the branch and the residual (Gemma 2, 3).
    """

    input_norm: Norm
    qkv: Projection
    qkv_bias: Tensor | None
    head_norms: tuple[HeadNorm, HeadNorm] | None
    heads: tuple[int, int, int]
    softmax_scale: float
    window: int | None
    layer_type: str | None
    o: Projection
    output_norm: Norm | None


@dataclass
class AttentionSaved(Saved):
    """M tokens."""

    x: Tensor | None = None  # [M, h] the residual stream at the block's input
    rstd: Tensor | None = None  # float32 [M]
    qkv: Tensor | None = None  # [M, (Hq+2Hk)D] rotated, or raw where head norms need it raw
    attended: Tensor | None = None  # [M, Hq*D]
    state: State = ()
    y: Tensor | None = None  # [M, h] before the output norm, if there is one
    rstd_output: Tensor | None = None
    u_qkv: Tensor | None = None  # [M, rank] projections on the adapters
    u_o: Tensor | None = None

    again: ClassVar[dict[str, frozenset[str]]] = {
        "nothing": frozenset(),
        "gate_up": frozenset(),
        "all but down": frozenset({"rstd", "qkv", "attended", "state", "y", "rstd_output", "u_qkv", "u_o"}),
    }
    travels: ClassVar[tuple[str, ...]] = ("x", "qkv", "attended", "y")


class AttentionBlock:
    """One layer's attention over `parts`."""

    def __init__(self, parts: AttentionParts, operations: Operations) -> None:
        self.parts, self.operations = parts, operations
        self.projections = (parts.qkv, parts.o)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n_q, n_k, dim = self.parts.heads
        return qkv.unflatten(1, (n_q + 2 * n_k, dim)).split((n_q, n_k, n_k), dim=1)

    def _rotated(self, raw: Tensor, call: Call) -> Tensor:
        """q, k, v ready for attention: in place, unless head norms need the raw projection again."""
        p = self.parts
        out = raw if p.head_norms is None else torch.empty_like(raw)
        cos, sin = call.rotary[p.layer_type]
        self.operations.rotary(raw, cos, sin, p.heads, p.qkv_bias, p.head_norms, out)
        return out

    def forward(self, x: Tensor, delta: Tensor | None, call: Call, saved: AttentionSaved) -> Tensor:
        """The branch's output [M, h]; fills `saved`, whose x is the sum of both inputs."""
        p, m = self.parts, x.shape[0]
        normed = p.qkv.input(m)
        total, saved.rstd = p.input_norm.forward(self.operations, x, delta, normed.values, normed.e4m3)
        saved.x = total.detach()
        u = p.qkv.project(normed, p.qkv.dropout(call.seed)) if call.adapters else None
        saved.u_qkv = None if u is None else u[:, : p.qkv.rank].contiguous()
        saved.qkv = p.qkv.forward(normed, u)
        del normed, u
        q, k, v = self._heads(self._rotated(saved.qkv, call))
        attended, saved.state = attend(q, k, v, call.layout, p.softmax_scale, p.window)
        saved.attended = attended.reshape(m, p.o.k)
        wide = Widened.of(saved.attended, p.o.size.border)
        u = p.o.project(wide, p.o.dropout(call.seed)) if call.adapters else None
        saved.u_o = None if u is None else u[:, : p.o.rank].contiguous()
        y = p.o.forward(wide, u)
        if p.output_norm is not None:
            saved.y, y = y, torch.empty_like(y)
            _, saved.rstd_output = p.output_norm.forward(self.operations, saved.y, None, y)
        return y

    def backward(
        self, grad: Widened, saved: AttentionSaved, call: Call, gradients: Gradients, border: int | None
    ) -> Widened | None:
        """d(loss)/d(x) [M, h] beside `border` columns, from that of the sum; None if nobody needs it.

        grad: beside o's columns, with its e4m3 where o reads that; overwritten.
        """
        p = self.parts
        assert saved.x is not None and saved.rstd is not None and saved.qkv is not None
        assert saved.attended is not None and saved.u_qkv is not None and saved.u_o is not None
        dy, grad = grad, grad.with_e4m3(None)
        if p.output_norm is not None:
            assert saved.y is not None and saved.rstd_output is not None
            dy = p.output_norm.backward(
                self.operations, grad.values, saved.y, saved.rstd_output, None, p.o.size.border,
                p.o.e4m3_output(len(grad.values)),
            )  # fmt: skip
        v, masks = p.o.project_back(dy), p.o.dropout(call.seed)
        d_attended = p.o.backward(dy, v, dropout=masks)
        dy = dy.with_e4m3(None)  # read for the last time
        p.o.adapter_gradients(saved.attended, saved.u_o, dy.values, v, gradients, dropout=masks)
        n_q, _, dim = p.heads
        rotated = saved.qkv if p.head_norms is None else self._rotated(saved.qkv, call)
        q, k, v = self._heads(rotated)
        dq, dk, dv = attend_backward(
            d_attended.unflatten(1, (n_q, dim)), q, k, v, saved.attended.unflatten(1, (n_q, dim)),
            saved.state, call.layout, p.softmax_scale, p.window,
        )  # fmt: skip
        raw = None if p.head_norms is None else saved.qkv
        saved.qkv = saved.attended = None
        del d_attended, rotated, q, k, v, dy
        d_qkv = p.qkv.output(saved.x.shape[0])
        cos, sin = call.rotary[p.layer_type]
        self.operations.rotary_backward(
            dq, dk, dv, raw, cos, sin, p.heads, p.qkv_bias, p.head_norms, d_qkv.values
        )
        del dq, dk, dv, raw
        v, masks = p.qkv.project_back(d_qkv), p.qkv.dropout(call.seed)
        p.qkv.adapter_gradients(
            saved.x, saved.u_qkv, d_qkv.values, v, gradients, saved.rstd, p.input_norm.factor, masks
        )
        if border is None:
            return None
        d_normed = p.qkv.backward(d_qkv, v, dropout=masks)
        return p.input_norm.backward(self.operations, d_normed, saved.x, saved.rstd, grad, border)


@dataclass(frozen=True)
class AttentionSize:
    """What the block keeps and needs, in bytes a token unless said; what `AttentionBlock` does line by line.

    hidden, q (queries) and kv (keys, or values) in features; dtype_bytes of an activation.
    """

    hidden: int
    q: int
    kv: int
    heads: int
    output_norm: bool
    qkv: ProductSize
    o: ProductSize
    dtype_bytes: int

    def kept(self, policy: str) -> int:
        """`AttentionSaved` between the passes, before any copy to the host."""
        s, x = self.dtype_bytes, self.dtype_bytes * self.hidden
        if policy in RECOMPUTED:
            return x
        rest = s * (self.qkv.n + self.q + self.qkv.rank + self.o.rank) + 4 + 4 * self.heads
        return x + rest + (s * self.hidden + 4 if self.output_norm else 0)

    def travels(self, policy: str) -> int:
        """What of it a policy on the host moves there."""
        if policy in RECOMPUTED:
            return self.dtype_bytes * self.hidden
        streams = 2 if self.output_norm else 1
        return self.dtype_bytes * (streams * self.hidden + self.qkv.n + self.q)

    def forward(self) -> int:
        """In hand at most: x, then all up to the output and the output projection's input."""
        return self.dtype_bytes * (self.hidden + self.qkv.n + self.q + 2 * self.hidden + self.o.border)

    def backward(self, tokens: int) -> int:
        """Bytes of `tokens` that `attend_backward` takes: d_attended, dq, dk, dv, and what it sums up in."""
        s, q, kv = self.dtype_bytes, self.q, self.kv
        given = self.o.e4m3_output  # what the MLP's half hands on in e4m3 lives on
        parts = accumulation_parts(tokens * q, max(1, kv * self.heads // q))
        sums = 4 * q + (2 * s * q if kv < q else 0)  # float32 dq; dk and dv of every query head
        found = s * (q + 2 * kv)
        if parts == 1:
            return tokens * (given + s * q + found + sums)
        copied = found if copies(tokens * self.qkv.n) else 0
        copied += 2 * s * q if copies(tokens * q) else 0
        return tokens * (given + found + (found + sums + copied) // parts)  # dq takes the place of d_attended
