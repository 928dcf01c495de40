"""One decoder layer, forward and backward by hand.

Comes in: the residual stream as (x, delta), whose sum is meant; goes out: the next (x2, delta). The
addition happens inside the next norm, where both are read anyway. Backward: the gradient of the sum,
which is the gradient of both: one buffer that travels from the head to the embedding, each layer adding
its branches in place. No gradient of a frozen weight exists anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.kernels import Dropout, Fp8Rows, Operations
from qlora_trainer.kernels.attention import Layout, attend, attend_backward

from .keep import ON_HOST, RECOMPUTED, HostStore, Saved, keep_only
from .parts import LayerParts, Norm
from .projection import Gradients
from .wide import widen, with_border


@dataclass(frozen=True)
class Call:
    """What one pass over the model gives every layer.

    rotary: layer type -> (cos, sin), float32 [M, half]. training: a backward pass will follow.
    position_ids [B, T] and document_ids (int32 [B, T], if packed): what unfused layers read instead.
    seed: int64 [], what LoRA dropout's masks are made from; None where nothing is dropped.
    anchor: an empty leaf that stands for adapters whose gradient goes to `main_grad` and is no business of
    autograd's. Of this pass alone: autograd waits for the stream on which a leaf was first used, and a pass
    that is captured must not wait for one that was not.
    """

    layout: Layout
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    training: bool
    position_ids: Tensor
    document_ids: Tensor | None
    seed: Tensor | None
    anchor: Tensor


class FusedLayer:
    """`policy` as in `keep.py`; `mlp_rows`: tokens of the MLP in flight at once where it is recomputed."""

    def __init__(
        self,
        index: int,
        parts: LayerParts,
        operations: Operations,
        policy: str,
        host: HostStore | None,
        mlp_rows: int,
    ) -> None:
        self.index, self.parts, self.operations = index, parts, operations
        self.policy, self.host, self.mlp_rows = policy, host, mlp_rows

    def __call__(self, x: Tensor, delta: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """(x, delta), each [M, h] -> (x2, delta2)."""
        ours = [p for p in self.parts.parameters if getattr(p, "main_grad", None) is None]
        return _LayerFunction.apply(x, delta, self, call, call.anchor, *ours)

    # -- forward ---------------------------------------------------------------------------------

    def _norm(
        self, norm: Norm, x: Tensor, delta: Tensor | None, out: Tensor, rows: Fp8Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.operations.rms_norm(x, delta, norm.weight, norm.eps, norm.offset, out, rows)

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

    def attention(self, x: Tensor, delta: Tensor | None, call: Call, saved: Saved) -> Tensor:
        """The attention branch's output [M, h]; fills `saved` up to x2."""
        p, m = self.parts, x.shape[0]
        wide, rows = p.qkv.wide_input(m), p.qkv.fp8_input(m)
        total, saved.rstd1 = self._norm(p.input_norm, x, delta, wide[:, : p.qkv.k], rows)
        saved.x = total.detach()
        u = p.qkv.project(wide, p.qkv.dropout(call.seed))
        saved.u_qkv = u[:, : p.qkv.rank].contiguous()
        saved.qkv = p.qkv.forward(wide, u, rows=rows)
        del wide, rows, u
        q, k, v = self._heads(self._rotated(saved.qkv, call))
        attended, saved.state = attend(q, k, v, call.layout, p.softmax_scale, p.window)
        saved.attended = attended.reshape(m, p.o.k)
        wide = widen(saved.attended, p.o.border)
        u = p.o.project(wide, p.o.dropout(call.seed))
        saved.u_o = u[:, : p.o.rank].contiguous()
        y = p.o.forward(wide, u)
        if p.attention_output_norm is not None:
            saved.y_attention, y = y, torch.empty_like(y)
            _, saved.rstd_attention = self._norm(p.attention_output_norm, saved.y_attention, None, y)
        return y

    def _chunks(self, m: int) -> Iterator[slice]:
        rows = m if self.policy == "none" else self.mlp_rows
        return (slice(start, min(start + rows, m)) for start in range(0, m, rows))

    def mlp(self, y: Tensor, call: Call, saved: Saved) -> Tensor:
        """The MLP branch's output [M, h] on saved.x + y; fills the rest of `saved`."""
        p, m = self.parts, y.shape[0]
        assert saved.x is not None
        wide, normed = p.gate_up.wide_input(m), p.gate_up.fp8_input(m)
        total, saved.rstd2 = self._norm(p.mlp_norm, saved.x, y, wide[:, : p.gate_up.k], normed)
        saved.x2 = total.detach()
        out = torch.empty_like(y)
        saved.u_down = torch.empty((m, p.down.rank), dtype=y.dtype, device=y.device)
        for rows in self._chunks(m):
            masks, masks_down = (group.dropout(call.seed, rows.start) for group in (p.gate_up, p.down))
            part = None if normed is None else normed[rows]
            gate_up, saved.u_gate_up = self._gate_up(wide[rows], part, masks)
            act, inner = p.down.wide_input(gate_up.shape[0]), p.down.fp8_input(gate_up.shape[0])
            self.operations.glu(gate_up[:, : p.gate_up.n], p.activation, act[:, : p.down.k], inner)
            u = p.down.project(act, masks_down)
            saved.u_down[rows] = u[:, : p.down.rank]
            p.down.forward(act, u, out=out[rows], rows=inner)
            if self.policy == "none":
                saved.gate_up = gate_up
            del gate_up, act, inner, u
        if p.mlp_output_norm is not None:
            saved.y_mlp, out = out, torch.empty_like(out)
            _, saved.rstd_mlp = self._norm(p.mlp_output_norm, saved.y_mlp, None, out)
        return out

    def _gate_up(self, wide: Tensor, rows: Fp8Rows | None, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
        """Wide gate/up [M, 2F + border] (its border empty) and the projection on its adapters."""
        group = self.parts.gate_up
        u = group.project(wide, dropout)
        result = group.wide_output(wide.shape[0])
        group.forward(wide, u, out=result[:, : group.n], rows=rows)
        return result, u[:, : group.rank].contiguous()

    # -- backward --------------------------------------------------------------------------------

    def _norm_backward(
        self, norm: Norm, dy: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None, border: int,
        rows: Fp8Rows | None = None,
    ) -> Tensor:  # fmt: skip
        """Gradient of a norm's input, plus the residual's (in its place, if it can be), wide by `border`."""
        wide = None if residual is None else with_border(residual, border)
        if wide is None:
            wide = torch.empty((x.shape[0], x.shape[1] + border), dtype=x.dtype, device=x.device)
        self.operations.rms_norm_backward(
            dy, x, rstd, norm.weight, norm.offset, residual, wide[:, : x.shape[1]], rows
        )
        return wide

    def mlp_backward(
        self, grad: Tensor, saved: Saved, call: Call, gradients: Gradients
    ) -> tuple[Tensor, Fp8Rows | None]:
        """d(loss)/d(x2) [M, h], wide by o's border, from `grad` [M, h] of the output sum; and its e4m3."""
        p = self.parts
        assert saved.x2 is not None and saved.rstd2 is not None and saved.u_down is not None
        if p.mlp_output_norm is not None:
            assert saved.y_mlp is not None and saved.rstd_mlp is not None
            wide = self._norm_backward(
                p.mlp_output_norm, grad, saved.y_mlp, saved.rstd_mlp, None, p.down.border
            )
        else:
            wide = widen(grad, p.down.border)
        d_normed = torch.empty_like(saved.x2)
        for rows in self._chunks(wide.shape[0]):
            x2, rstd2 = saved.x2[rows], saved.rstd2[rows]
            masks, masks_down = (group.dropout(call.seed, rows.start) for group in (p.gate_up, p.down))
            if saved.gate_up is not None and saved.u_gate_up is not None:
                gate_up, u = saved.gate_up, saved.u_gate_up
                saved.gate_up = None
            else:
                again, normed = p.gate_up.wide_input(x2.shape[0]), p.gate_up.fp8_input(x2.shape[0])
                self._norm(p.mlp_norm, x2, None, again[:, : p.gate_up.k], normed)
                gate_up, u = self._gate_up(again, normed, masks)
                del again, normed
            part, d_gate_up = wide[rows], gate_up[:, : p.gate_up.n]
            v_down = p.down.project_back(part)
            d_act = p.down.backward(part, v_down, dropout=masks_down)
            # the gradients of down's A and of gate's and up's B pass by here
            down_a, down_b = p.down.targets(gradients)
            gate_b, up_b = p.gate_up.halved_targets(gradients)
            self.operations.glu_backward_(
                d_act, d_gate_up, p.activation, v_down[:, : p.down.rank], u, p.gate_up.rank_spans,
                down_a, gate_b, up_b, masks_down,
            )  # fmt: skip
            del d_act
            v = p.gate_up.project_back(gate_up)
            p.gate_up.backward(gate_up, v, d_normed[rows], dropout=masks)
            thin = self.operations.thin_gradient
            if down_b:
                thin(saved.u_down[rows], part[:, : p.down.n], None, None, down_b)
            gate_up_a, _ = p.gate_up.targets(gradients)
            if gate_up_a:
                thin(v[:, : p.gate_up.rank], x2, rstd2, p.mlp_norm.factor, gate_up_a, masks)
            del gate_up, d_gate_up, v  # views of it, too
        into_o = None if p.attention_output_norm is not None else p.o.fp8_output(grad.shape[0])
        x2, saved.x2 = saved.x2, None
        d_x2 = self._norm_backward(p.mlp_norm, d_normed, x2, saved.rstd2, grad, p.o.border, into_o)
        return d_x2, into_o

    def attention_backward(
        self, d_x2: Tensor, rows: Fp8Rows | None, saved: Saved, call: Call, gradients: Gradients,
        needs_input: bool,
    ) -> Tensor | None:  # fmt: skip
        """d(loss)/d(x) [M, h] from what `mlp_backward` gave; None if nobody needs it."""
        p = self.parts
        assert saved.x is not None and saved.rstd1 is not None and saved.qkv is not None
        assert saved.attended is not None and saved.u_qkv is not None and saved.u_o is not None
        hidden = saved.x.shape[1]
        wide = d_x2
        if p.attention_output_norm is not None:
            assert saved.y_attention is not None and saved.rstd_attention is not None
            rows = p.o.fp8_output(wide.shape[0])
            wide = self._norm_backward(
                p.attention_output_norm, d_x2[:, :hidden], saved.y_attention, saved.rstd_attention, None,
                p.o.border, rows,
            )  # fmt: skip
        v, masks = p.o.project_back(wide), p.o.dropout(call.seed)
        d_attended = p.o.backward(wide, v, rows=rows, dropout=masks)
        del rows
        p.o.adapter_gradients(saved.attended, saved.u_o, wide[:, : p.o.n], v, gradients, dropout=masks)
        n_q, _, dim = p.heads
        rotated = saved.qkv if p.head_norms is None else self._rotated(saved.qkv, call)
        q, k, v = self._heads(rotated)
        dq, dk, dv = attend_backward(
            d_attended.unflatten(1, (n_q, dim)), q, k, v, saved.attended.unflatten(1, (n_q, dim)),
            saved.state, call.layout, p.softmax_scale, p.window,
        )  # fmt: skip
        raw = None if p.head_norms is None else saved.qkv
        saved.qkv = saved.attended = None
        del d_attended, rotated, q, k, v
        wide = p.qkv.wide_output(saved.x.shape[0])
        cos, sin = call.rotary[p.layer_type]
        self.operations.rotary_backward(
            dq, dk, dv, raw, cos, sin, p.heads, p.qkv_bias, p.head_norms, wide[:, : p.qkv.n]
        )
        del dq, dk, dv, raw
        v, masks = p.qkv.project_back(wide), p.qkv.dropout(call.seed)
        d_qkv, factor = wide[:, : p.qkv.n], p.input_norm.factor
        p.qkv.adapter_gradients(saved.x, saved.u_qkv, d_qkv, v, gradients, saved.rstd1, factor, masks)
        if not needs_input:
            return None
        d_normed = p.qkv.backward(wide, v, dropout=masks)
        # the layer below feeds this to its down projection: same shape, same border
        out = self._norm_backward(
            p.input_norm, d_normed, saved.x, saved.rstd1, d_x2[:, :hidden], p.down.border
        )
        return out[:, :hidden]

    def recompute(self, saved: Saved, call: Call) -> Saved:
        """Everything up to x2 again, from x."""
        assert saved.x is not None
        again = Saved(u_down=saved.u_down, y_mlp=saved.y_mlp, rstd_mlp=saved.rstd_mlp)
        y = self.attention(saved.x, None, call, again)
        again.x2, again.rstd2 = self._norm(self.parts.mlp_norm, saved.x, y, torch.empty_like(y))
        return again


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        layer: FusedLayer,
        call: Call,
        anchor: Tensor,
        *ours: Tensor,
    ) -> Any:
        saved = Saved()
        y = layer.attention(x, delta, call, saved)
        if not call.training or layer.policy in RECOMPUTED:
            saved = keep_only(saved, "full")
        out = layer.mlp(y, call, saved)
        assert saved.x2 is not None
        x2 = saved.x2.view_as(saved.x2)  # an alias: the node must not hold its own output
        if call.training:
            saved = keep_only(saved, layer.policy)
            if layer.host is not None:
                saved = layer.host.put(layer.index, saved, layer.policy)
            ctx.layer, ctx.call, ctx.saved, ctx.ours = layer, call, saved, ours
        return x2, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_x2: Tensor, d_out: Tensor) -> Any:
        """Both outputs are only ever used as their sum: either gradient is the sum's."""
        layer, call, saved = ctx.layer, ctx.call, ctx.saved
        ctx.saved = None  # one backward a forward: the buffers are overwritten on the way
        assert saved is not None, "the backward of a fused layer ran twice"
        if layer.policy in ON_HOST and layer.host is not None:
            saved = layer.host.get(layer.index, saved)
        if layer.policy in RECOMPUTED:
            saved = layer.recompute(saved, call)
        gradients = Gradients()
        d_mid, rows = layer.mlp_backward(d_out, saved, call, gradients)
        needs_x, needs_delta = ctx.needs_input_grad[:2]
        dx = layer.attention_backward(d_mid, rows, saved, call, gradients, needs_x or needs_delta)
        returned = gradients.collect(ctx.ours)
        return dx if needs_x else None, dx if needs_delta else None, None, None, None, *returned
