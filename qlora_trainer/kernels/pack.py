"""A group's adapters laid out for one product: one launch for up to three members.

Comes in: each member's A [r, K] and B [n, r] as PEFT keeps them. Goes out: A stacked [R, K] and
scaling·B block-diagonal [N, R], zero where no member owns, usually in the border of an extended weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .types import Adapter


@triton.jit
def _member(pointer, first, second, first0, n_first, second0, n_second, stride, scaling, in_range):
    """Values of one member where (first, second) falls into its rectangle, 0 elsewhere."""
    inside = in_range & (first >= first0) & (first < first0 + n_first)
    inside &= (second >= second0) & (second < second0 + n_second)
    offset = (first - first0) * stride + (second - second0)
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32) * scaling


@triton.jit
def _pack_kernel(
    a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr, a_ptr, b_ptr, k, n, width, a_stride, b_stride, a_blocks,
    rank0, rank1, rank2, start1, start2, row1, row2, n0, n1, n2, scaling0, scaling1, scaling2,
    BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Programs below `a_blocks` write columns of A, the others rows of B. An absent member has rank 0."""
    pid = tl.program_id(0)
    if pid < a_blocks:
        rank = tl.arange(0, RANK)[:, None]
        column = pid * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rank < width) & (column < k)
        a = _member(a0_ptr, rank, column, 0, rank0, 0, k, k, 1.0, inside)
        a += _member(a1_ptr, rank, column, start1, rank1, 0, k, k, 1.0, inside)
        a += _member(a2_ptr, rank, column, start2, rank2, 0, k, k, 1.0, inside)
        tl.store(a_ptr + rank.to(tl.int64) * a_stride + column, a.to(a_ptr.dtype.element_ty), mask=inside)
    else:
        row = (pid - a_blocks) * BLOCK + tl.arange(0, BLOCK)[:, None]
        of_b = tl.arange(0, RANK)[None, :]
        in_b = (row < n) & (of_b < width)
        b = _member(b0_ptr, row, of_b, 0, n0, 0, rank0, rank0, scaling0, in_b)
        b += _member(b1_ptr, row, of_b, row1, n1, start1, rank1, rank1, scaling1, in_b)
        b += _member(b2_ptr, row, of_b, row2, n2, start2, rank2, rank2, scaling2, in_b)
        tl.store(b_ptr + row.to(tl.int64) * b_stride + of_b, b.to(b_ptr.dtype.element_ty), mask=in_b)


def pack_adapters(adapters: Sequence[Adapter], a: Tensor, b: Tensor) -> None:
    """As `reference.pack_adapters`, for one to three members."""
    assert 1 <= len(adapters) <= 3, f"a group of {len(adapters)} members"
    first = adapters[0]
    assert first.rank0 == 0 or len(adapters) < 3
    members = [*adapters]
    if first.row0 or first.rank0:  # the first slot starts at zero
        members.insert(0, Adapter(first.A[:0], first.B[:0, :0], 0.0, 0, 0))
    members += [Adapter(first.A[:0], first.B[:0, :0], 0.0, 0, 0)] * (3 - len(members))
    (width, k), n = a.shape, b.shape[0]
    rank = triton.next_power_of_2(width)
    block = max(16, 4096 // rank)
    a_blocks = triton.cdiv(k, block)
    pointers = [m.A if m.A.numel() else first.A for m in members]
    pointers += [m.B if m.B.numel() else first.B for m in members]
    _pack_kernel[(a_blocks + triton.cdiv(n, block),)](
        *pointers, a, b, k, n, width, a.stride(0), b.stride(0), a_blocks,
        *(m.A.shape[0] for m in members),
        members[1].rank0, members[2].rank0, members[1].row0, members[2].row0,
        *(m.B.shape[0] if m.A.numel() else 0 for m in members), *(float(m.scaling) for m in members),
        BLOCK=block, RANK=rank, num_warps=4,
    )  # fmt: skip
