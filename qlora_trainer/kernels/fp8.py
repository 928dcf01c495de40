"""Row-scaled e4m3 operands for the frozen base's products (Hopper, Ada).

`quantize_fp8` gives an activation in e4m3 with a scale a row; the norms and the gated unit do the same
to the row they have just made (`store_row`), which then is not read again for it. `pack_fp8` brings what
stands beside it, an adapter's matrix or a projection on it, to the same scales; `fp8_product` is cuBLAS's.
NF4's own error is about 9% of a weight's RMS; e4m3 on top makes it 9.6%.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import Fp8Rows


@triton.jit
def store_row(x, row, column, inside, values_ptr, scales_ptr, stride):
    """A whole row in float32, zero outside; the program knows its largest value only now."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / 448.0
    tl.store(scales_ptr + row, scale)
    tl.store(
        values_ptr + row * stride + column, (x * (1.0 / scale)).to(values_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _quantize_fp8_kernel(x_ptr, values_ptr, scales_ptr, k, x_stride, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    store_row(x, row, column, inside, values_ptr, scales_ptr, stride)


def row_warps(block: int) -> int:
    """Warps of a program that holds `block` columns of a row."""
    return min(16, max(1, block // 1024))


def quantize_fp8(x: Tensor, rows: Fp8Rows) -> None:
    """As `reference.quantize_fp8`; K ≤ 65536."""
    m, k = x.shape
    block = triton.next_power_of_2(k)
    _quantize_fp8_kernel[(m,)](
        x, rows.values, rows.scales, k, x.stride(0), rows.values.stride(0),
        BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip


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
