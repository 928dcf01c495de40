"""Products of a tall, wide activation with a few adapter columns: bounded by reading the wide one once.

`thin_gradient` reduces over the tokens, in a fixed order (partial sums, then one more reduction):
the same bits every time, which float atomics would not give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _thin_gradient_kernel(
    narrow_ptr, wide_ptr, scale_ptr, partial_ptr, m, r, c, rows_a_split, narrow_stride, wide_stride,
    SCALE: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    rank = tl.arange(0, RANK)
    total = tl.zeros((RANK, BC), tl.float32)
    end = tl.minimum(m, (split + 1) * rows_a_split)
    for start in range(split * rows_a_split, end, BM):
        row = start + tl.arange(0, BM)
        wide = tl.load(
            wide_ptr + row[:, None].to(tl.int64) * wide_stride + column[None, :],
            mask=(row[:, None] < end) & (column[None, :] < c), other=0.0,
        )  # fmt: skip
        narrow = tl.load(
            narrow_ptr + row[None, :].to(tl.int64) * narrow_stride + rank[:, None],
            mask=(row[None, :] < end) & (rank[:, None] < r), other=0.0,
        )  # fmt: skip
        if SCALE:
            scale = tl.load(scale_ptr + row, mask=row < end, other=0.0)
            narrow = (narrow.to(tl.float32) * scale[None, :]).to(narrow.dtype)
        total = tl.dot(narrow, wide, total, input_precision=PRECISION)
    target = partial_ptr + (split * r + rank[:, None]) * c + column[None, :]
    tl.store(target, total, mask=(rank[:, None] < r) & (column[None, :] < c))


def thin_gradient(narrow: Tensor, wide: Tensor, row_scale: Tensor | None) -> Tensor:
    """As `reference.thin_gradient`; narrow [M, R ≤ 256], wide [M, C]."""
    (m, r), c = narrow.shape, wide.shape[1]
    rank = max(16, triton.next_power_of_2(r))
    bm, bc = (64, 128) if rank <= 64 else (32, 64)
    blocks = triton.cdiv(c, bc)
    # enough programs for two or three a multiprocessor, each with at least four tiles to pipeline
    splits = max(1, min(triton.cdiv(m, 4 * bm), triton.cdiv(396, blocks)))
    rows = triton.cdiv(triton.cdiv(m, splits), bm) * bm
    splits = triton.cdiv(m, rows)
    partial = torch.empty((splits, r, c), dtype=torch.float32, device=wide.device)
    _thin_gradient_kernel[(blocks, splits)](
        narrow, wide, narrow if row_scale is None else row_scale, partial, m, r, c, rows,
        narrow.stride(0), wide.stride(0), SCALE=row_scale is not None, RANK=rank, BM=bm, BC=bc,
        PRECISION="ieee" if wide.dtype == torch.float32 else "tf32", num_warps=4, num_stages=4,
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)
