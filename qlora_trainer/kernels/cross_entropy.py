"""Cross-entropy of a chunk of logits, whose gradient replaces the logits in place.

One program a row, two passes: online log-sum-exp, then the gradient. The second pass finds the row
in L2 (a row of 128k bfloat16 logits is 256 KB), so device memory sees one read and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    v,
    stride,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        inside = start + column < v
        x = tl.load(base + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(inside, _capped(x, softcap, SOFTCAP), float("-inf"))
        seen = tl.maximum(largest, x)
        anchor = tl.where(seen == float("-inf"), 0.0, seen)
        total = total * tl.exp(largest - anchor) + tl.exp(x - anchor)
        largest = seen
    peak = tl.max(largest, axis=0)
    lse = peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))
    chosen = _capped(tl.load(base + target).to(tl.float32), softcap, SOFTCAP)
    tl.store(losses_ptr + row, lse - chosen)
    tl.debug_barrier()  # the target's logit is read before its gradient replaces it
    for start in range(0, v, BLOCK):
        inside = start + column < v
        x = tl.load(base + start + column, mask=inside, other=0.0).to(tl.float32)
        x = _capped(x, softcap, SOFTCAP)
        grad = tl.exp(x - lse) - tl.where(start + column == target, 1.0, 0.0)
        if SOFTCAP:
            grad *= 1.0 - (x / softcap) * (x / softcap)
        tl.store(base + start + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """As `reference.cross_entropy_`."""
    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(rows,)](
        logits, targets, losses, v, logits.stride(0), softcap or 1.0, SOFTCAP=softcap is not None,
        BLOCK=min(4096, triton.next_power_of_2(v)), num_warps=8,
    )  # fmt: skip
    return losses
