"""RMSNorm with the residual addition before it, and its backward with the residual gradient after it.

One program a row: every tensor is read once and written once. rstd travels to the backward pass
(4 bytes a token), where the adapters need it too: they never see the normed activation again. Either
gives what it writes in e4m3 as well, if asked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import store_row
from .types import Fp8Rows


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, rstd_ptr, values_ptr, scales_ptr, k,
    x_stride, delta_stride, out_stride, values_stride, eps, offset,
    ADD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.debug_barrier()  # in place: every read of the row comes before any write to it
        tl.store(delta_ptr + row * delta_stride + column, x, mask=inside)
    value = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=0) / k + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    out = (value * rstd * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column, out, mask=inside)
    if FP8:
        store_row(out.to(tl.float32), row, column, inside, values_ptr, scales_ptr, values_stride)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, residual_ptr, out_ptr, rstd_ptr, values_ptr, scales_ptr, k,
    dy_stride, x_stride, residual_stride, out_stride, values_stride, offset,
    RESIDUAL: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    value = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    rstd = tl.load(rstd_ptr + row)
    normed = value * rstd
    grad *= weight
    dx = rstd * (grad - normed * (tl.sum(grad * normed, axis=0) / k))
    if RESIDUAL:
        dx += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = dx.to(out_ptr.dtype.element_ty)
    tl.debug_barrier()  # `out` may be `dy` or `residual`
    tl.store(out_ptr + row * out_stride + column, out, mask=inside)
    if FP8:
        store_row(out.to(tl.float32), row, column, inside, values_ptr, scales_ptr, values_stride)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _fp8(rows: Fp8Rows | None, unused: Tensor) -> tuple[Tensor, Tensor, int]:
    """(values, scales, stride of values)."""
    return (unused, unused, 0) if rows is None else (rows.values, rows.scales, rows.values.stride(0))


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor,
    rows: Fp8Rows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.rms_norm`."""
    m, k = x.shape
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    total = x if delta is None else delta
    block = triton.next_power_of_2(k)
    values, scales, values_stride = _fp8(rows, out)
    _rms_norm_forward_kernel[(m,)](
        x, total, weight, out, rstd, values, scales, k, x.stride(0), total.stride(0), out.stride(0),
        values_stride, eps, offset, ADD=delta is not None, FP8=rows is not None, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return total, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float, residual: Tensor | None, out: Tensor,
    rows: Fp8Rows | None = None,
) -> None:  # fmt: skip
    """As `reference.rms_norm_backward`."""
    m, k = x.shape
    block = triton.next_power_of_2(k)
    other = dy if residual is None else residual
    values, scales, values_stride = _fp8(rows, out)
    _rms_norm_backward_kernel[(m,)](
        dy, x, weight, other, out, rstd, values, scales, k, dy.stride(0), x.stride(0), other.stride(0),
        out.stride(0), values_stride, offset, RESIDUAL=residual is not None, FP8=rows is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
