"""Bias, per-head norm and rotation of a fused q/k/v projection, in one pass each way.

A program owns one token and a few heads: forward may run in place, because it reads a head whole
before it writes it. The rotation and its inverse are one kernel with the sine's sign turned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .types import HeadNorm


@triton.jit
def _head_norm_weight(q_weight_ptr, k_weight_ptr, is_q, column, inside, offset):
    wq = tl.load(q_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wk = tl.load(k_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q[:, None], wq[None, :], wk[None, :]) + offset


@triton.jit
def _rotary_forward_kernel(
    qkv_ptr, out_ptr, cos_ptr, sin_ptr, bias_ptr, q_weight_ptr, k_weight_ptr,
    n_q, n_k, n_heads, qkv_stride, out_stride, half, eps, offset,
    BIAS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head[:, None] < n_heads) & (column[None, :] < DIM)
    turned = (head[:, None] < n_q + n_k) & (column[None, :] < 2 * half)
    # the partner of column i is i + half in the first half of the pair, i - half in the second
    partner = tl.where(column < half, column + half, tl.where(column < 2 * half, column - half, column))
    source = head[:, None] * DIM
    x = tl.load(qkv_ptr + row * qkv_stride + source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(qkv_ptr + row * qkv_stride + source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + source + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias_ptr + source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        is_q = head < n_q
        normed = head[:, None] < n_q + n_k
        wx = _head_norm_weight(q_weight_ptr, k_weight_ptr, is_q, column, column < DIM, offset)
        wy = _head_norm_weight(q_weight_ptr, k_weight_ptr, is_q, partner, column < DIM, offset)
        x = tl.where(normed, x * rstd * wx, x)
        y = tl.where(normed, y * rstd * wy, y)
    angle = tl.where(column < half, column, column - half)
    has_angle = column < 2 * half
    cos = tl.load(cos_ptr + row * half + angle, mask=has_angle, other=1.0)
    sin = tl.load(sin_ptr + row * half + angle, mask=has_angle, other=0.0)
    sin = tl.where(column < half, -sin, sin)
    rotated = x * cos[None, :] + y * sin[None, :]
    result = tl.where(turned, rotated, x)
    tl.debug_barrier()  # in place: every read of this head comes before any write to it
    tl.store(
        out_ptr + row * out_stride + source + column[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _rotary_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, out_ptr, cos_ptr, sin_ptr, bias_ptr, q_weight_ptr, k_weight_ptr,
    n_q, n_k, n_heads, dq_row, dq_head, dk_row, dk_head, dv_row, dv_head, qkv_stride, out_stride,
    half, eps, offset,
    BIAS: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    narrow = column < DIM
    is_q, is_v = head < n_q, head >= n_q + n_k
    is_k = (head >= n_q) & (head < n_q + n_k)
    inside = (head[:, None] < n_heads) & narrow[None, :]
    turned = (head[:, None] < n_q + n_k) & (column[None, :] < 2 * half)
    partner = tl.where(column < half, column + half, tl.where(column < 2 * half, column - half, column))
    q_base = row * dq_row + head[:, None] * dq_head
    k_base = row * dk_row + (head[:, None] - n_q) * dk_head
    v_base = row * dv_row + (head[:, None] - n_q - n_k) * dv_head
    q_keep, k_keep = is_q[:, None] & narrow[None, :], is_k[:, None] & narrow[None, :]
    v_keep = is_v[:, None] & inside
    g = tl.load(dq_ptr + q_base + column[None, :], mask=q_keep, other=0.0).to(tl.float32)
    g += tl.load(dk_ptr + k_base + column[None, :], mask=k_keep, other=0.0).to(tl.float32)
    g += tl.load(dv_ptr + v_base + column[None, :], mask=v_keep, other=0.0).to(tl.float32)
    h = tl.load(dq_ptr + q_base + partner[None, :], mask=q_keep, other=0.0).to(tl.float32)
    h += tl.load(dk_ptr + k_base + partner[None, :], mask=k_keep, other=0.0).to(tl.float32)
    angle = tl.where(column < half, column, column - half)
    has_angle = column < 2 * half
    cos = tl.load(cos_ptr + row * half + angle, mask=has_angle, other=1.0)
    sin = tl.load(sin_ptr + row * half + angle, mask=has_angle, other=0.0)
    sin = tl.where(column < half, sin, -sin)
    g = tl.where(turned, g * cos[None, :] + h * sin[None, :], g)
    if NORM:
        source = head[:, None] * DIM + column[None, :]
        x = tl.load(qkv_ptr + row * qkv_stride + source, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias_ptr + source, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        normed = x * rstd
        scaled = g * _head_norm_weight(q_weight_ptr, k_weight_ptr, is_q, column, narrow, offset)
        back = rstd * (scaled - normed * (tl.sum(scaled * normed, axis=1) / DIM)[:, None])
        g = tl.where(is_v[:, None], g, back)
    target = out_ptr + row * out_stride + head[:, None] * DIM + column[None, :]
    tl.store(target, g.to(out_ptr.dtype.element_ty), mask=inside)


_HEADS = 8


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int], bias: Tensor | None,
    norms: tuple[HeadNorm, HeadNorm] | None, out: Tensor,
) -> None:  # fmt: skip
    """As `reference.rotary`. Both head norms share eps and offset."""
    n_q, n_k, dim = heads
    # in place with nothing to add to v, its heads need no visit
    untouched = n_k if bias is None and out.data_ptr() == qkv.data_ptr() else 0
    visited = n_q + 2 * n_k - untouched
    q_norm, k_norm = norms if norms is not None else (None, None)
    _rotary_forward_kernel[(qkv.shape[0], triton.cdiv(visited, _HEADS))](
        qkv, out, cos, sin, qkv if bias is None else bias,
        q_norm.weight if q_norm else cos, k_norm.weight if k_norm else cos,
        n_q, n_k, visited, qkv.stride(0), out.stride(0), cos.shape[1],
        q_norm.eps if q_norm else 0.0, q_norm.offset if q_norm else 0.0,
        BIAS=bias is not None, NORM=norms is not None, DIM=dim, HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip


def rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    heads: tuple[int, int, int], bias: Tensor | None, norms: tuple[HeadNorm, HeadNorm] | None, out: Tensor,
) -> None:  # fmt: skip
    """As `reference.rotary_backward`."""
    n_q, n_k, dim = heads
    q_norm, k_norm = norms if norms is not None else (None, None)
    raw = out if qkv is None else qkv
    _rotary_backward_kernel[(dq.shape[0], triton.cdiv(n_q + 2 * n_k, _HEADS))](
        dq, dk, dv, raw, out, cos, sin, out if bias is None else bias,
        q_norm.weight if q_norm else cos, k_norm.weight if k_norm else cos,
        n_q, n_k, n_q + 2 * n_k,
        dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
        raw.stride(0), out.stride(0), cos.shape[1],
        q_norm.eps if q_norm else 0.0, q_norm.offset if q_norm else 0.0,
        BIAS=bias is not None and norms is not None, NORM=norms is not None, DIM=dim, HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
