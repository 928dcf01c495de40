"""SwiGLU and GeGLU, forward and in-place backward; the backward also makes its neighbours' adapter gradients.

The backward writes both gradients over gate and up. While a tile of them and of the activation is in
registers, it is multiplied with the few columns that give the gradients of the down projection's A
and of the gate/up projections' B: the widest tensors of a layer are not read again for them.

Not kept: projecting the activation (forward) and its gradient (backward) on the adapters in the same
pass. Summing over columns instead of rows left too little in flight; 352 + 648 microseconds against
335 + 690 for separate launches at 8192 x 14336, and slower below 2048 tokens. The adapter gradients
in this pass take 484 microseconds against 788 (one H100 80GB, torch 2.11, 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter_grad import adapter_grad, add_partials
from .device import multiprocessors
from .dropout import MASK_NUMBERS, kept, mask_arguments, mask_key
from .fp8 import row_warps, store_row
from .types import Dropout, Fp8Rows, Target


@triton.jit
def _tanh(x):
    # 1 - 2/(exp(2x)+1): no overflow to NaN at either end, and no dependence on libdevice
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _value_and_slope(gate, GELU: tl.constexpr):
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        t = _tanh(inner)
        value = 0.5 * gate * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * 0.7978845608028654 * (
            1.0 + 3.0 * 0.044715 * gate * gate
        )
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return value, slope


@triton.jit
def _glu_forward_kernel(
    gate_up_ptr, out_ptr, f, gate_up_stride, out_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    base = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + f, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, GELU)
    tl.store(out_ptr + row * out_stride + column, (value * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_forward_fp8_kernel(
    gate_up_ptr, out_ptr, values_ptr, scales_ptr, f, gate_up_stride, out_stride, values_stride,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same by whole rows, for their e4m3."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < f
    base = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + f, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, GELU)
    out = (value * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, out, mask=inside)
    store_row(out.to(tl.float32), row, column, inside, values_ptr, scales_ptr, values_stride)


@triton.jit
def _glu_backward_kernel(
    d_act_ptr, gate_up_ptr, f, d_act_stride, gate_up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < f
    base = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + f, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(d_act_ptr + row * d_act_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, GELU)
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(base, (grad * up * slope).to(dtype), mask=inside)
    tl.store(base + f, (grad * value).to(dtype), mask=inside)
    tl.store(d_act_ptr + row * d_act_stride + column, (value * up).to(dtype), mask=inside)


@triton.jit
def _few_columns(pointer, row, rank, stride, rank0, n, in_rows):
    """[RANK, BM]: columns rank0… rank0+n of some rows, turned."""
    inside = in_rows[None, :] & (rank[:, None] < n)
    source = pointer + row[None, :].to(tl.int64) * stride + rank0 + rank[:, None]
    return tl.load(source, mask=inside, other=0.0)


@triton.jit(do_not_specialize=MASK_NUMBERS)
def _glu_backward_adapter_grad_kernel(
    d_act_ptr, gate_up_ptr, v_ptr, u_ptr, partial_ptr, m, f, rows_a_split,
    d_act_stride, gate_up_stride, v_stride, u_stride, v_n, gate_rank0, gate_n, up_rank0, up_n,
    seed_ptr, first, row0, start1, start2, threshold, ADAPTERS: tl.constexpr,
    GELU: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks down `rows_a_split` rows of BC columns. partial: [splits, 3, RANK, F]."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    rank = tl.arange(0, RANK)
    of_down = tl.zeros((RANK, BC), tl.float32)
    of_gate = tl.zeros((RANK, BC), tl.float32)
    of_up = tl.zeros((RANK, BC), tl.float32)
    if ADAPTERS > 0:
        key = mask_key(seed_ptr, first)
    dtype = gate_up_ptr.dtype.element_ty
    end = tl.minimum(m, (split + 1) * rows_a_split)
    for start in range(split * rows_a_split, end, BM):
        row = start + tl.arange(0, BM)
        in_rows = row < end
        inside = in_rows[:, None] & (column[None, :] < f)
        base = gate_up_ptr + row[:, None].to(tl.int64) * gate_up_stride + column[None, :]
        d_base = d_act_ptr + row[:, None].to(tl.int64) * d_act_stride + column[None, :]
        gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(base + f, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_base, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(gate, GELU)
        d_gate = (grad * up * slope).to(dtype)
        d_up = (grad * value).to(dtype)
        act = (value * up).to(dtype)
        tl.store(base, d_gate, mask=inside)
        tl.store(base + f, d_up, mask=inside)
        v = _few_columns(v_ptr, row, rank, v_stride, 0, v_n, in_rows)
        u_gate = _few_columns(u_ptr, row, rank, u_stride, gate_rank0, gate_n, in_rows)
        u_up = _few_columns(u_ptr, row, rank, u_stride, up_rank0, up_n, in_rows)
        if ADAPTERS > 0:
            act = tl.where(kept(key, row0 + row, tl.program_id(0) * BC, threshold, BC), act, 0.0).to(dtype)
        of_down = tl.dot(v, act, of_down, input_precision=PRECISION)
        of_gate = tl.dot(u_gate, d_gate, of_gate, input_precision=PRECISION)
        of_up = tl.dot(u_up, d_up, of_up, input_precision=PRECISION)
    target = partial_ptr + (split * 3 * RANK + rank[:, None]).to(tl.int64) * f + column[None, :]
    in_f = column[None, :] < f
    tl.store(target, of_down, mask=in_f & (rank[:, None] < v_n))
    target = partial_ptr + (split * 3 * RANK + RANK + rank[:, None]).to(tl.int64) * f + column[None, :]
    tl.store(target, of_gate, mask=in_f & (rank[:, None] < gate_n))
    target = partial_ptr + (split * 3 * RANK + 2 * RANK + rank[:, None]).to(tl.int64) * f + column[None, :]
    tl.store(target, of_up, mask=in_f & (rank[:, None] < up_n))


_BLOCK = 1024


def glu(gate_up: Tensor, activation: str, out: Tensor, rows: Fp8Rows | None = None) -> None:
    """As `reference.glu`."""
    m, f = out.shape
    if rows is not None:
        block = triton.next_power_of_2(f)
        _glu_forward_fp8_kernel[(m,)](
            gate_up, out, rows.values, rows.scales, f, gate_up.stride(0), out.stride(0),
            rows.values.stride(0), GELU=activation != "silu", BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
        return
    _glu_forward_kernel[(m, triton.cdiv(f, _BLOCK))](
        gate_up, out, f, gate_up.stride(0), out.stride(0), GELU=activation != "silu", BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip


# Of a program of the fused backward: rows, columns, warps, stages; and programs wanted on each
# multiprocessor.
_TILE = (32, 64, 4, 3, 8)


def glu_backward_(
    d_act: Tensor, gate_up: Tensor, activation: str, v: Tensor, u: Tensor,
    ranks: tuple[tuple[int, int], tuple[int, int]],
    down: Sequence[Target], gate: Sequence[Target], up: Sequence[Target], dropout: Dropout | None = None,
) -> None:  # fmt: skip
    """As `reference.glu_backward_`."""
    m, f = d_act.shape
    widest = max(v.shape[1], ranks[0][1], ranks[1][1])
    if widest > 64 or not (down or gate or up):
        _glu_backward_kernel[(m, triton.cdiv(f, _BLOCK))](
            d_act, gate_up, f, d_act.stride(0), gate_up.stride(0), GELU=activation != "silu", BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
        for narrow, wide, targets, masks in (
            (v, d_act, down, dropout),
            (u[:, ranks[0][0] : sum(ranks[0])], gate_up[:, :f], gate, None),
            (u[:, ranks[1][0] : sum(ranks[1])], gate_up[:, f:], up, None),
        ):
            if targets:
                adapter_grad(narrow, wide, None, None, targets, masks)
        return
    rank = max(16, triton.next_power_of_2(widest))
    bm, bc, warps, stages, programs = _TILE
    blocks = triton.cdiv(f, bc)
    splits = max(
        1, min(triton.cdiv(m, 4 * bm), triton.cdiv(programs * multiprocessors(d_act.device), blocks))
    )
    rows = triton.cdiv(triton.cdiv(m, splits), bm) * bm
    splits = triton.cdiv(m, rows)
    partial = torch.empty((splits, 3, rank, f), dtype=torch.float32, device=d_act.device)
    _glu_backward_adapter_grad_kernel[(blocks, splits)](
        d_act, gate_up, v, u, partial, m, f, rows,
        d_act.stride(0), gate_up.stride(0), v.stride(0), u.stride(0), v.shape[1], *ranks[0], *ranks[1],
        **mask_arguments(dropout, d_act),
        GELU=activation != "silu", RANK=rank, BM=bm, BC=bc,
        PRECISION="ieee" if d_act.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    scales = (dropout.scale if dropout is not None else 1.0, 1.0, 1.0)
    for share, (targets, scale) in enumerate(zip((down, gate, up), scales, strict=True)):
        add_partials(partial[:, share], None, targets, scale)
