"""Row-scaled e4m3 operands for the frozen base's products (Hopper, Ada).

`quantize_fp8` turns [x | u], an activation and its projection on the adapters, into one e4m3
operand with a scale a row; `pack_fp8` brings an adapter's matrix to the scales of the frozen weight
it stands beside; `fp8_product` is cuBLAS's. NF4's own error is about 9% of a weight's RMS; e4m3 on
top makes it 9.6%.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, u_ptr, out_ptr, scale_ptr, k, r, x_stride, u_stride, out_stride, border,
    BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A program holds a whole row: it is read once, though its scale is known only at its end."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < k, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x.to(tl.float32)), axis=0), 1e-12) / 448.0
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    scaled = (x.to(tl.float32) * inverse).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, scaled, mask=column < k)
    if RANK > 0:
        rank = tl.arange(0, RANK)
        u = tl.load(u_ptr + row * u_stride + rank, mask=rank < r, other=0.0).to(tl.float32)
        u = u * (inverse * border)
        u = tl.minimum(tl.maximum(u, -448.0), 448.0)
        tl.store(out_ptr + row * out_stride + k + rank, u.to(out_ptr.dtype.element_ty), mask=rank < r)


def quantize_fp8(x: Tensor, u: Tensor | None, border: float, out: Tensor) -> Tensor:
    """As `reference.quantize_fp8`; K ≤ 65536."""
    m, k = x.shape
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    r, u_stride = (0, 0) if u is None else (u.shape[1], u.stride(0))
    _quantize_fp8_kernel[(m,)](
        x, x if u is None else u, out, scale, k, r, x.stride(0), u_stride, out.stride(0), border,
        BLOCK=block, RANK=triton.next_power_of_2(r) if r else 0, num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip
    return scale


@triton.jit
def _pack_fp8_kernel(
    source_ptr, scale_ptr, out_ptr, n, r, row_stride, column_stride, out_stride, factor,
    ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    inside = (row[:, None] < n) & (rank[None, :] < r)
    scale = tl.load(scale_ptr + row, mask=row < n, other=1.0)
    source = source_ptr + row[:, None] * row_stride + rank[None, :] * column_stride
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32) * (factor / scale)[:, None]
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    target = out_ptr + row[:, None].to(tl.int64) * out_stride + rank[None, :]
    tl.store(target, x.to(out_ptr.dtype.element_ty), mask=inside)


def pack_fp8(source: Tensor, scale: Tensor, factor: float, out: Tensor) -> None:
    """As `reference.pack_fp8`."""
    n, r = out.shape
    _pack_fp8_kernel[(triton.cdiv(n, 64),)](
        source, scale, out, n, r, source.stride(0), source.stride(1), out.stride(0), factor,
        ROWS=64, RANK=triton.next_power_of_2(r), num_warps=4,
    )  # fmt: skip


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> None:
    """As `reference.fp8_product`, on the matrix units (their fast accumulation)."""
    torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=weight_scale.T,
        out_dtype=out.dtype, use_fast_accum=True, out=out,
    )  # fmt: skip
