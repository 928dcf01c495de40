"""What is measured: shapes, policies, and batches of random tokens for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.data.batch import IGNORE, Batch


@dataclass(frozen=True)
class Cell:
    """One measurement. `rows` x `length` tokens a micro-batch, `accumulation` of them a step.

    mean_length: None for full rows; else documents of log-normal length with that mean (tokens), packed.
    The remaining fields are arguments of `model.fuse.fuse`.
    """

    name: str
    rows: int
    length: int
    accumulation: int = 1
    mean_length: int | None = None
    activations: str | Sequence[str] = "none"
    base_gemm: str = "bf16"
    resident_bytes: int | None = None
    embeddings: str = "device"
    logits_bytes: int | None = None
    graph: bool = True


def document_lengths(mean: int, total: int, longest: int, generator: torch.Generator) -> list[int]:
    """Log-normal lengths (sigma 0.8) from 8 to `longest` tokens that sum to about `total`."""
    sigma = 0.8
    mu = math.log(mean) - sigma**2 / 2
    lengths: list[int] = []
    while sum(lengths) < total:
        draw = torch.randn((), generator=generator).item()
        lengths.append(int(min(longest, max(8, math.exp(mu + sigma * draw)))))
    return lengths


def _pack(lengths: Sequence[int], rows: int, capacity: int) -> list[list[int]]:
    """First-fit decreasing into `rows` rows; what fits nowhere is left out."""
    bins: list[list[int]] = [[] for _ in range(rows)]
    for length in sorted(lengths, reverse=True):
        for row in bins:
            if sum(row) + length <= capacity:
                row.append(length)
                break
    return bins


def make_batch(cell: Cell, vocabulary: int, generator: torch.Generator) -> Batch:
    """Random tokens, every token but a document's first supervised."""
    shape = (cell.rows, cell.length)
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    documents = torch.full(shape, -1, dtype=torch.int32)
    positions = torch.zeros(shape, dtype=torch.int64)
    if cell.mean_length is None:
        bins = [[cell.length] for _ in range(cell.rows)]
    else:
        lengths = document_lengths(cell.mean_length, math.prod(shape), cell.length, generator)
        bins = _pack(lengths, cell.rows, cell.length)
    labels = torch.full(shape, IGNORE)
    for r, row in enumerate(bins):
        start = 0
        for d, length in enumerate(row):
            span = slice(start, start + length)
            documents[r, span] = d
            positions[r, span] = torch.arange(length)
            labels[r, start + 1 : start + length] = ids[r, start + 1 : start + length]
            start += length
    weights: Tensor = (labels != IGNORE).float()
    return Batch(ids, labels, weights, positions, documents, ())
