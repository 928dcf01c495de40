"""The gated MLP block: norm, gate and up, the gated unit, down; forward, backward, and its bytes.

Comes in: the residual stream as (x, delta), whose sum is meant. Goes out: the branch's output. Where gate and
up are made again in the backward pass, both passes go some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora_trainer.kernels import Dropout, Operations

from .activations import RECOMPUTED, Saved
from .adapter_columns import Widened
from .call import Call
from .norm import Norm
from .projection import Gradients, ProductSize, Projection

TOKENS_AT_ONCE = 4096  # of the inner activations, where a layer makes them twice


@dataclass(frozen=True)
class MlpParts:
    """What the block is made of; output_norm: a norm between the branch and the residual (Gemma 2, 3)."""

    input_norm: Norm
    gate_up: Projection
    down: Projection
    activation: str  # "silu" or "gelu_tanh"
    output_norm: Norm | None


@dataclass
class MlpSaved(Saved):
    """M tokens."""

    x: Tensor | None = None  # [M, h] the residual stream at the block's input
    rstd: Tensor | None = None  # float32 [M]
    gate_up: Widened | None = None  # [M, 2F]
    y: Tensor | None = None  # [M, h] before the output norm, if there is one
    rstd_output: Tensor | None = None
    u_gate_up: Tensor | None = None  # [M, rank] projections on the adapters
    u_down: Tensor | None = None

    again: ClassVar[dict[str, frozenset[str]]] = {
        "nothing": frozenset(),
        "gate_up": frozenset({"gate_up", "u_gate_up"}),
        "all but down": frozenset({"x", "rstd", "gate_up", "u_gate_up"}),
    }
    travels: ClassVar[tuple[str, ...]] = ("x", "y")


class MlpBlock:
    """One layer's MLP over `parts`, under an activation policy."""

    def __init__(
        self, parts: MlpParts, operations: Operations, policy: str, tokens_at_once: int = TOKENS_AT_ONCE
    ) -> None:
        self.parts, self.operations = parts, operations
        self.policy, self.tokens_at_once = policy, tokens_at_once
        self.projections = (parts.gate_up, parts.down)

    def _chunks(self, m: int) -> Iterator[slice]:
        rows = m if self.policy == "none" else self.tokens_at_once
        return (slice(start, min(start + rows, m)) for start in range(0, m, rows))

    def _gate_up(
        self, normed: Widened, dropout: Dropout | None, adapters: bool
    ) -> tuple[Widened, Tensor | None]:
        """Gate and up [M, 2F] (their spare columns empty) and the projection on their adapters."""
        group = self.parts.gate_up
        u = group.project(normed, dropout) if adapters else None
        result = group.output(len(normed.buffer))
        group.forward(normed, u, out=result.values)
        return result, None if u is None else u[:, : group.rank].contiguous()

    def forward(self, x: Tensor, delta: Tensor, call: Call, saved: MlpSaved) -> Tensor:
        """The branch's output [M, h]; fills `saved`, whose x is the sum of both inputs."""
        p, m = self.parts, x.shape[0]
        normed = p.gate_up.input(m)
        total, saved.rstd = p.input_norm.forward(self.operations, x, delta, normed.values, normed.e4m3)
        saved.x = total.detach()
        out = torch.empty_like(delta)
        saved.u_down = torch.empty((m, p.down.rank), dtype=delta.dtype, device=delta.device)
        for rows in self._chunks(m):
            masks, masks_down = (group.dropout(call.seed, rows.start) for group in (p.gate_up, p.down))
            gate_up, saved.u_gate_up = self._gate_up(normed[rows], masks, call.adapters)
            inner = p.down.input(len(gate_up.buffer))
            self.operations.glu(gate_up.values, p.activation, inner.values, inner.e4m3)
            u = p.down.project(inner, masks_down) if call.adapters else None
            if u is not None:
                saved.u_down[rows] = u[:, : p.down.rank]
            p.down.forward(inner, u, out=out[rows])
            if self.policy == "none":
                saved.gate_up = gate_up
            del gate_up, inner, u
        if p.output_norm is not None:
            saved.y, out = out, torch.empty_like(out)
            _, saved.rstd_output = p.output_norm.forward(self.operations, saved.y, None, out)
        return out

    def renew_input(self, x: Tensor, delta: Tensor, saved: MlpSaved) -> None:
        """The sum of the block's inputs and its 1/rms again."""
        saved.x, saved.rstd = self.parts.input_norm.forward(
            self.operations, x, delta, torch.empty_like(delta)
        )

    def backward(
        self, grad: Widened, saved: MlpSaved, call: Call, gradients: Gradients, reader: Projection,
        direct: bool,
    ) -> Widened:  # fmt: skip
        """d(loss)/d(x) [M, h] from that of the sum, which is overwritten where it has the reader's border.

        reader: the product whose gradient passes next. direct: it reads this very gradient, in e4m3 if that
        is what it takes.
        """
        p, operations = self.parts, self.operations
        assert saved.x is not None and saved.rstd is not None and saved.u_down is not None
        if p.output_norm is not None:
            assert saved.y is not None and saved.rstd_output is not None
            d_out = p.output_norm.backward(
                operations, grad.values, saved.y, saved.rstd_output, None, p.down.size.border
            )
        else:
            d_out = grad = grad.with_border(p.down.size.border)
        d_normed = torch.empty_like(saved.x)
        for rows in self._chunks(len(d_out.buffer)):
            x, rstd = saved.x[rows], saved.rstd[rows]
            masks, masks_down = (group.dropout(call.seed, rows.start) for group in (p.gate_up, p.down))
            gate_up, u = saved.gate_up, saved.u_gate_up
            saved.gate_up = None
            if gate_up is None:
                again = p.gate_up.input(x.shape[0])
                p.input_norm.forward(operations, x, None, again.values, again.e4m3)
                gate_up, u = self._gate_up(again, masks, True)
                del again
            assert u is not None
            part = d_out[rows]
            v_down = p.down.project_back(part)
            d_inner = p.down.backward(part, v_down, dropout=masks_down)
            # the gradients of down's A and of gate's and up's B pass by here
            down_a, down_b = p.down.targets(gradients)
            gate_b, up_b = p.gate_up.halved_targets(gradients)
            operations.glu_backward_(
                d_inner, gate_up.values, p.activation, v_down[:, : p.down.rank], u, p.gate_up.rank_spans,
                down_a, gate_b, up_b, masks_down,
            )  # fmt: skip
            del d_inner
            v = p.gate_up.project_back(gate_up)
            p.gate_up.backward(gate_up, v, d_normed[rows], dropout=masks)
            if down_b:
                operations.adapter_grad(saved.u_down[rows], part.values, None, None, down_b)
            gate_up_a, _ = p.gate_up.targets(gradients)
            if gate_up_a:
                operations.adapter_grad(
                    v[:, : p.gate_up.rank], x, rstd, p.input_norm.factor, gate_up_a, masks
                )
            del gate_up, v  # views of it, too
        x, saved.x = saved.x, None
        e4m3 = reader.e4m3_output(x.shape[0]) if direct else None
        return p.input_norm.backward(operations, d_normed, x, saved.rstd, grad, reader.size.border, e4m3)


@dataclass(frozen=True)
class MlpSize:
    """What the block keeps and needs, in bytes a token unless said; what `MlpBlock` does line by line."""

    hidden: int
    output_norm: bool
    gate_up: ProductSize
    down: ProductSize
    dtype_bytes: int

    def kept(self, policy: str) -> int:
        """`MlpSaved` between the passes, before any copy to the host."""
        s = self.dtype_bytes
        found = s * self.down.rank + (s * self.hidden + 4 if self.output_norm else 0)
        if policy in RECOMPUTED:
            return found
        found += s * self.hidden + 4
        return found + (s * (self._wide(self.gate_up) + self.gate_up.rank) if policy == "none" else 0)

    @staticmethod
    def _wide(group: ProductSize) -> int:
        return group.n + group.border

    def travels(self, policy: str) -> int:
        """What of it a policy on the host moves there."""
        streams = (policy not in RECOMPUTED) + self.output_norm
        return self.dtype_bytes * self.hidden * streams

    def inner(self, tokens: int) -> int:
        """Bytes of the inner activations of `tokens`, where they are made for some at a time."""
        per_token = self.dtype_bytes * (self._wide(self.gate_up) + self.down.k + self.down.border)
        return min(tokens, TOKENS_AT_ONCE) * (per_token + self.down.e4m3_input)

    def forward(self, tokens: int, policy: str) -> int:
        """Bytes of `tokens` in hand at most beside what is kept, under `none`, or beside nothing."""
        s, h = self.dtype_bytes, self.hidden
        if policy == "none":
            each = s * (2 * h + self.down.k + self.down.border) + self.down.e4m3_input
            return tokens * (each + self.gate_up.e4m3_input)
        # x and the branch's output; attention's output and the next product's input
        return tokens * (s * (4 * h + self.gate_up.border) + self.gate_up.e4m3_input) + self.inner(tokens)

    def backward(self, tokens: int, policy: str) -> int:
        """Bytes of `tokens` beside the stream's gradient and what is kept: d_normed, and the inner part."""
        s, h, f = self.dtype_bytes, self.hidden, self.down.k
        of_down = s * f + self.down.e4m3_output
        if policy == "none":
            of_up = self.gate_up.n + (1 + s) * self.gate_up.pad if self.gate_up.e4m3 else 0
            return tokens * (s * h + max(of_down, of_up))
        rows = min(tokens, TOKENS_AT_ONCE)
        inner = s * self._wide(self.gate_up) + max(s * (h + self.gate_up.border), of_down)
        return tokens * s * h + rows * inner

    def freed(self, tokens: int, policy: str) -> int:
        """Bytes of what is kept that are gone when the block's backward pass has ended."""
        gate_up = self._wide(self.gate_up) if policy == "none" else 0
        return tokens * self.dtype_bytes * (self.hidden + gate_up)
