"""Adapter gradients: a tall, wide activation times a few columns, bounded by reading the wide one once.

The reduction over the tokens has a fixed order (partial sums, then one more reduction that adds to
the gradient buffers): the same bits every time, which float atomics would not give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import multiprocessors
from .dropout import MASK_NUMBERS, kept, mask_arguments, mask_key, rank_span
from .types import Dropout, Target


@triton.jit(do_not_specialize=MASK_NUMBERS)
def _adapter_grad_kernel(
    narrow_ptr, wide_ptr, scale_ptr, partial_ptr, m, r, c, rows_a_split, narrow_stride, wide_stride,
    seed_ptr, first, row0, start1, start2, threshold, ADAPTERS: tl.constexpr,
    SCALE: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks down `rows_a_split` rows of BC columns: for all of R, or one adapter's if dropped."""
    block, rank0, end_rank = tl.program_id(0), 0, r
    if ADAPTERS > 0:
        adapter = block % ADAPTERS
        block = block // ADAPTERS
        rank0, end_rank = rank_span(adapter, start1, start2, r)
        key = mask_key(seed_ptr, first + adapter)
    column = block * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    rank = rank0 + tl.arange(0, RANK)
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
            mask=(row[None, :] < end) & (rank[:, None] < end_rank), other=0.0,
        )  # fmt: skip
        if SCALE:
            scale = tl.load(scale_ptr + row, mask=row < end, other=0.0)
            narrow = (narrow.to(tl.float32) * scale[None, :]).to(narrow.dtype)
        if ADAPTERS > 0:
            wide = tl.where(kept(key, row0 + row, block * BC, threshold, BC), wide, 0.0).to(wide.dtype)
        total = tl.dot(narrow, wide, total, input_precision=PRECISION)
    target = partial_ptr + (split * r + rank[:, None]).to(tl.int64) * c + column[None, :]
    tl.store(target, total, mask=(rank[:, None] < end_rank) & (column[None, :] < c))


@triton.jit
def _add_kernel(
    partial_ptr, out_ptr, scale_ptr, split_stride, c, row0, column0, rows, columns, row_stride, column_stride,
    alpha, SCALE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RANK)[:, None]
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (rank < rows) & (column < columns)
    source = partial_ptr + (row0 + rank).to(tl.int64) * c + column0 + column
    target = out_ptr + rank.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    before = tl.load(target, mask=inside, other=0.0)
    total = tl.load(source, mask=inside, other=0.0)
    for i in tl.static_range(1, SPLITS):
        total += tl.load(source + i * split_stride, mask=inside, other=0.0)
    if SCALE:
        total *= tl.load(scale_ptr + column0 + column, mask=column < columns, other=0.0)
    tl.store(target, before + alpha * total, mask=inside)


def add_partials(
    partial: Tensor, column_scale: Tensor | None, targets: Sequence[Target], scale: float = 1.0
) -> None:
    """Sum `partial` [splits, R, C] over splits, times column_scale and scale; add its parts to `targets`."""
    for t in targets:
        rows, columns = (t.out.shape[1], t.out.shape[0]) if t.transposed else t.out.shape
        row_stride, column_stride = (t.out.stride(1), t.out.stride(0)) if t.transposed else t.out.stride()
        rank = triton.next_power_of_2(rows)
        block = max(16, min(64, 4096 // rank))
        _add_kernel[(triton.cdiv(columns, block),)](
            partial, t.out, partial if column_scale is None else column_scale, partial.stride(0),
            partial.stride(1), t.row0, t.column0, rows, columns, row_stride, column_stride, t.alpha * scale,
            SCALE=column_scale is not None, SPLITS=partial.shape[0], RANK=rank, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _tile(rank: int) -> tuple[int, int, int, int, int]:
    """(rows, columns, warps, stages) of a program, and programs wanted on each multiprocessor."""
    if rank <= 64:
        return 64, 128, 4, 3, 2
    return (32, 64, 4, 4, 3) if rank <= 256 else (16, 32, 4, 2, 3)


def adapter_grad(
    narrow: Tensor,
    wide: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    targets: Sequence[Target],
    dropout: Dropout | None = None,
) -> None:
    """As `reference.adapter_grad`; narrow [M, R ≤ 768], targets float32."""
    (m, r), c = narrow.shape, wide.shape[1]
    ranks = dropout.ranks if dropout is not None else (r,)
    rank = max(16, triton.next_power_of_2(max(ranks)))
    bm, bc, warps, stages, programs = _tile(rank)
    blocks = triton.cdiv(c, bc) * len(ranks)
    # enough programs to fill the GPU, each with at least four tiles to pipeline
    splits = max(1, min(triton.cdiv(m, 4 * bm), triton.cdiv(programs * multiprocessors(wide.device), blocks)))
    rows = triton.cdiv(triton.cdiv(m, splits), bm) * bm
    splits = triton.cdiv(m, rows)
    partial = torch.empty((splits, r, c), dtype=torch.float32, device=wide.device)
    _adapter_grad_kernel[(blocks, splits)](
        narrow, wide, narrow if row_scale is None else row_scale, partial, m, r, c, rows,
        narrow.stride(0), wide.stride(0), **mask_arguments(dropout, wide),
        SCALE=row_scale is not None, RANK=rank, BM=bm, BC=bc,
        PRECISION="ieee" if wide.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    add_partials(partial, column_scale, targets, dropout.scale if dropout is not None else 1.0)
