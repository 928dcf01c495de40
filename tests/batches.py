"""Hand-made batches: random documents with a mask, padded one per row or packed."""

from __future__ import annotations

import torch

from qlora_trainer.data.batch import IGNORE, Batch


def collate(rows: list[list[torch.Tensor]], supervised_from: int = 1) -> Batch:
    """Rows of documents (int64 token ids each); the first `supervised_from` tokens carry no label."""
    length = max(sum(len(document) for document in row) for row in rows)
    shape = (len(rows), length)
    ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, -1, dtype=torch.int32)
    for r, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            span = slice(start, start + len(document))
            ids[r, span] = document
            labels[r, start + supervised_from : start + len(document)] = document[supervised_from:]
            positions[r, span] = torch.arange(len(document))
            documents[r, span] = d
            start += len(document)
    n = sum(len(row) for row in rows)
    return Batch(ids, labels, (labels != IGNORE).float(), positions, documents, tuple(range(n)))


def documents(lengths: list[int], vocab: int = 250, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, vocab, (n,), generator=generator) for n in lengths]
