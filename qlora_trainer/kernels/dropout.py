"""LoRA dropout: an adapter's share of a product and of its gradient, with masks made in registers.

Comes in: activations, a group's stacked A, the numbers its masks are made from (`types.Dropout`).
Goes out: u = scale · (mask ∘ x)·Aᵀ for the forward product's border, and, added to the base's share of
the gradient, scale · mask ∘ (v·A). Every adapter of a group has a mask of its own, so programs for the
same tile of x and different adapters run side by side: all but the first find it in the L2 cache.
`adapter_grad.py` and `glu.py` make the same masks for the gradients of A.

A mask costs about six integer operations an element, as 32 mixed bits decide on two neighbouring
columns. Bit for bit those of `reference.kept`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import multiprocessors
from .types import Dropout

# The numbers that masks are made from differ between layers and steps: a kernel is compiled once for all.
MASK_NUMBERS = ["first", "row0", "threshold"]


@triton.jit
def _mixed(x):
    """As `reference._mixed`, of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def mask_key(seed_ptr, adapter):
    """uint32: what the mask of adapter number `adapter` is made from."""
    seed = tl.load(seed_ptr)
    key = _mixed(_mixed(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    return _mixed(key ^ adapter.to(tl.uint32))


@triton.jit
def kept(key, row, column0, threshold, COLUMNS: tl.constexpr):
    """bool [rows, COLUMNS], as `reference.kept`: these rows, from the even column `column0` on."""
    keys = _mixed(key ^ row.to(tl.uint32))
    pair = (column0 // 2 + tl.arange(0, COLUMNS // 2)).to(tl.uint32) * 0x9E3779B9
    bits = _mixed(keys[:, None] ^ pair[None, :])
    bits = bits.to(tl.int32, bitcast=True)
    return tl.interleave(bits << 16, bits) >= threshold


@triton.jit
def rank_span(adapter, start1, start2, end):
    """(first, after the last) rank column of a group's adapter 0, 1 or 2."""
    first = tl.where(adapter == 0, 0, tl.where(adapter == 1, start1, start2))
    last = tl.where(adapter == 0, start1, tl.where(adapter == 1, start2, end))
    return first, last


def mask_arguments(dropout: Dropout | None, unused: Tensor) -> dict[str, Any]:
    """What kernels take to make masks, by parameter; ADAPTERS is 0 where nothing is dropped."""
    if dropout is None:
        return {
            "seed_ptr": unused, "first": 0, "row0": 0, "start1": 0, "start2": 0, "threshold": 0, "ADAPTERS": 0
        }  # fmt: skip
    ends = [end for _, end in dropout.spans]
    assert 1 <= len(ends) <= 3, f"a group of {len(ends)} adapters"
    start1, start2, _ = (*ends, ends[-1], ends[-1])[:3]
    return {
        "seed_ptr": dropout.seed, "first": dropout.first, "row0": dropout.row0, "start1": start1,
        "start2": start2, "threshold": dropout.threshold, "ADAPTERS": len(ends),
    }  # fmt: skip


@triton.jit(do_not_specialize=MASK_NUMBERS)
def _project_dropped_kernel(
    x_ptr, a_ptr, partial_ptr, m, k, r, columns_a_split, x_stride, a_stride,
    seed_ptr, first, row0, start1, start2, threshold,
    ADAPTERS: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks along `columns_a_split` columns of BM rows for one adapter. partial: [splits, M, R]."""
    adapter = tl.program_id(0) % ADAPTERS
    row = (tl.program_id(0) // ADAPTERS) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    rank0, end_rank = rank_span(adapter, start1, start2, r)
    rank = rank0 + tl.arange(0, RANK)
    key = mask_key(seed_ptr, first + adapter)
    total = tl.zeros((BM, RANK), tl.float32)
    end = tl.minimum(k, (split + 1) * columns_a_split)
    for start in range(split * columns_a_split, end, BK):
        column = start + tl.arange(0, BK)
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * x_stride + column[None, :],
            mask=(row[:, None] < m) & (column[None, :] < end), other=0.0,
        )  # fmt: skip
        a = tl.load(
            a_ptr + rank[None, :].to(tl.int64) * a_stride + column[:, None],
            mask=(rank[None, :] < end_rank) & (column[:, None] < end), other=0.0,
        )  # fmt: skip
        x = tl.where(kept(key, row0 + row, start, threshold, BK), x, 0.0).to(x.dtype)
        total = tl.dot(x, a, total, input_precision=PRECISION)
    target = partial_ptr + (split * m + row[:, None]).to(tl.int64) * r + rank[None, :]
    tl.store(target, total, mask=(row[:, None] < m) & (rank[None, :] < end_rank))


@triton.jit
def _sum_dropped_kernel(
    partial_ptr, out_ptr, m, r, width, out_stride, scale,
    SPLITS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < m) & (column < r)
    total = tl.zeros((BM, WIDTH), tl.float32)
    for i in tl.static_range(SPLITS):
        source = partial_ptr + (i * m + row).to(tl.int64) * r + column
        total += tl.load(source, mask=inside, other=0.0)
    target = out_ptr + row.to(tl.int64) * out_stride + column
    tl.store(target, (total * scale).to(out_ptr.dtype.element_ty), mask=(row < m) & (column < width))


def _tile(rank: int) -> tuple[int, int, int, int, int]:
    """(rows, columns, warps, stages) of a program of the projection, and programs wanted on each
    multiprocessor."""
    if rank <= 64:
        return 64, 64, 4, 3, 4
    return (64, 32, 8, 2, 2) if rank <= 256 else (32, 32, 8, 2, 2)


def project_dropped(x: Tensor, a: Tensor, dropout: Dropout, out: Tensor) -> None:
    """As `reference.project_dropped`, for one to three adapters."""
    (m, k), r = x.shape, sum(dropout.ranks)
    rank = max(16, triton.next_power_of_2(max(dropout.ranks)))
    bm, bk, warps, stages, programs = _tile(rank)
    blocks = triton.cdiv(m, bm) * len(dropout.ranks)
    # enough programs to fill the GPU, each with at least four tiles to pipeline
    splits = max(1, min(triton.cdiv(k, 4 * bk), triton.cdiv(programs * multiprocessors(x.device), blocks)))
    columns = triton.cdiv(triton.cdiv(k, splits), bk) * bk
    splits = triton.cdiv(k, columns)
    partial = torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    _project_dropped_kernel[(blocks, splits)](
        x, a, partial, m, k, r, columns, x.stride(0), a.stride(0), **mask_arguments(dropout, x),
        RANK=rank, BM=bm, BK=bk, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    width = triton.next_power_of_2(out.shape[1])
    rows = max(1, 2048 // width)
    _sum_dropped_kernel[(triton.cdiv(m, rows),)](
        partial, out, m, r, out.shape[1], out.stride(0), dropout.scale,
        SPLITS=splits, BM=rows, WIDTH=width, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=MASK_NUMBERS)
def _add_dropped_kernel(
    dx_ptr, v_ptr, a_ptr, m, k, r, dx_stride, v_stride, a_stride, scale,
    seed_ptr, first, row0, start1, start2, threshold,
    ADAPTERS: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program adds every adapter's share, RANK columns of v at a time, to one tile of dx."""
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (row[:, None] < m) & (column[None, :] < k)
    target = dx_ptr + row[:, None].to(tl.int64) * dx_stride + column[None, :]
    before = tl.load(target, mask=inside, other=0.0)
    total = tl.zeros((BM, BK), tl.float32)
    for adapter in range(ADAPTERS):
        rank0, end_rank = rank_span(adapter, start1, start2, r)
        part = tl.zeros((BM, BK), tl.float32)
        for start in range(rank0, end_rank, RANK):
            rank = start + tl.arange(0, RANK)
            v = tl.load(
                v_ptr + row[:, None].to(tl.int64) * v_stride + rank[None, :],
                mask=(row[:, None] < m) & (rank[None, :] < end_rank), other=0.0,
            )  # fmt: skip
            a = tl.load(
                a_ptr + rank[:, None].to(tl.int64) * a_stride + column[None, :],
                mask=(rank[:, None] < end_rank) & (column[None, :] < k), other=0.0,
            )  # fmt: skip
            part = tl.dot(v, a, part, input_precision=PRECISION)
        key = mask_key(seed_ptr, first + adapter)
        total += tl.where(kept(key, row0 + row, tl.program_id(0) * BK, threshold, BK), part, 0.0)
    tl.store(target, (before.to(tl.float32) + scale * total).to(dx_ptr.dtype.element_ty), mask=inside)


def _back_tile() -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of the way back."""
    return 64, 64, 4


def add_dropped_(dx: Tensor, v: Tensor, a: Tensor, dropout: Dropout) -> None:
    """As `reference.add_dropped_`, for one to three adapters."""
    m, k = dx.shape
    rank = min(64, max(16, triton.next_power_of_2(max(dropout.ranks))))
    bm, bk, warps = _back_tile()
    _add_dropped_kernel[(triton.cdiv(k, bk), triton.cdiv(m, bm))](
        dx, v, a, m, k, sum(dropout.ranks), dx.stride(0), v.stride(0), a.stride(0), dropout.scale,
        **mask_arguments(dropout, dx), RANK=rank, BM=bm, BK=bk,
        PRECISION="ieee" if dx.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=1,
    )  # fmt: skip
