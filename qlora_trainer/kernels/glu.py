"""SwiGLU and GeGLU, forward and in-place backward.

The backward writes both gradients over gate and up, and the activation itself (which the adapter
of the down projection needs again) over its own gradient: no new memory, one read and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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


_BLOCK = 1024


def glu(gate_up: Tensor, activation: str, out: Tensor) -> None:
    """As `reference.glu`."""
    m, f = out.shape
    _glu_forward_kernel[(m, triton.cdiv(f, _BLOCK))](
        gate_up,
        out,
        f,
        gate_up.stride(0),
        out.stride(0),
        GELU=activation != "silu",
        BLOCK=_BLOCK,
        num_warps=4,
    )


def glu_backward_(d_act: Tensor, gate_up: Tensor, activation: str) -> None:
    """As `reference.glu_backward_`."""
    m, f = d_act.shape
    _glu_backward_kernel[(m, triton.cdiv(f, _BLOCK))](
        d_act,
        gate_up,
        f,
        d_act.stride(0),
        gate_up.stride(0),
        GELU=activation != "silu",
        BLOCK=_BLOCK,
        num_warps=4,
    )
