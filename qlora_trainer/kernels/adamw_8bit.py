"""One launch for an 8-bit AdamW update: decode, update, encode, without leaving the registers.

What it computes is `composed` in `optim/eight_bit.py`, to float32 rounding, but codes are the nearest
ones exactly (bitsandbytes' search on a CPU can be a few codes off near zero). Composed, the update of 168M
parameters took 22 ms on one H100, most of it between kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # elements that share a scale
BLOCKS = 4  # of them a program


@triton.jit
def _decode(codes_ptr, absmax_ptr, table_ptr, blocks, inside, BLOCK: tl.constexpr):
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes = tl.load(codes_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + blocks, mask=inside, other=0.0)
    return tl.load(table_ptr + codes) * absmax[:, None]


@triton.jit
def _encode(values, codes_ptr, absmax_ptr, borders_ptr, blocks, inside, BLOCK: tl.constexpr):
    absmax = tl.max(tl.abs(values), axis=1)
    scaled = values / tl.where(absmax == 0.0, 1.0, absmax)[:, None]
    code = tl.zeros_like(scaled).to(tl.int32)  # how many borders between neighbouring codes lie below
    for power in tl.static_range(8):
        higher = code + (128 >> power)
        code = tl.where(scaled > tl.load(borders_ptr + higher - 1), higher, code)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(codes_ptr + at, code.to(tl.uint8), mask=inside[:, None])
    tl.store(absmax_ptr + blocks, absmax, mask=inside)


@triton.jit
def _adamw_kernel(
    master_ptr, grad_ptr, m_ptr, m_absmax_ptr, v_ptr, v_absmax_ptr,
    signed_ptr, unsigned_ptr, signed_borders_ptr, unsigned_borders_ptr,
    divisor_ptr, skip_ptr, bias_ptr, n_blocks, lr, beta1, beta2, eps, weight_decay,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if tl.load(skip_ptr) != 0:
        return
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < n_blocks
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside[:, None], other=0.0) / tl.load(divisor_ptr)
    master = tl.load(master_ptr + at, mask=inside[:, None], other=0.0)
    m = _decode(m_ptr, m_absmax_ptr, signed_ptr, blocks, inside, BLOCK)
    v = _decode(v_ptr, v_absmax_ptr, unsigned_ptr, blocks, inside, BLOCK)
    master -= lr * weight_decay * master
    m = beta1 * m + (1.0 - beta1) * grad
    v = beta2 * v + (1.0 - beta2) * grad * grad
    master -= lr / tl.load(bias_ptr) * m / (tl.sqrt(v) / tl.load(bias_ptr + 1) + eps)
    tl.store(master_ptr + at, master, mask=inside[:, None])
    _encode(m, m_ptr, m_absmax_ptr, signed_borders_ptr, blocks, inside, BLOCK)
    _encode(v, v_ptr, v_absmax_ptr, unsigned_borders_ptr, blocks, inside, BLOCK)


def borders(code: Tensor) -> Tensor:
    """float32 [256]: where the nearest of two neighbouring codes changes; the last is never reached."""
    middle = (code[:-1] + code[1:]) / 2
    return torch.cat((middle, middle.new_full((1,), float("inf"))))


def adamw_8bit_(
    page: Mapping[str, Tensor],
    gradient: Tensor,
    tables: Mapping[str, tuple[Tensor, Tensor]],
    scalars: tuple[Tensor, Tensor, Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update master and moments in place; nothing changes where the step is skipped.

    Args:
        page: master float32 [n]; exp_avg, exp_avg_sq uint8 [n] and their `_absmax` float32 [n/256].
        gradient: float32 [n], not yet clipped.
        tables: of exp_avg and exp_avg_sq: the 256 values of the map, ascending, and their `borders`.
        scalars: on the device: what gradients are divided by [], 1 to skip else 0 [], and
            (1 - beta1^t, the square root of 1 - beta2^t) [2].
    """
    n_blocks = gradient.numel() // BLOCK
    (signed, signed_borders), (unsigned, unsigned_borders) = tables["exp_avg"], tables["exp_avg_sq"]
    _adamw_kernel[(triton.cdiv(n_blocks, BLOCKS),)](
        page["master"], gradient, page["exp_avg"], page["exp_avg_absmax"], page["exp_avg_sq"],
        page["exp_avg_sq_absmax"], signed, unsigned, signed_borders, unsigned_borders, *scalars,
        n_blocks, lr, *betas, eps, weight_decay, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
