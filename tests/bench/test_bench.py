"""The bench's batches and counts are what they say they are; measuring itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from qlora_trainer.bench.cells import Cell, document_lengths, make_batch
from qlora_trainer.bench.measure import model_flops
from qlora_trainer.data.batch import IGNORE
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.synthetic import random_base
from tests import tiny


def test_full_rows_are_full() -> None:
    batch = make_batch(Cell("c", 2, 64), 100, torch.Generator().manual_seed(0))
    assert batch.n_tokens == 128 and batch.n_supervised == 126 and not batch.packed


def test_packed_rows_hold_whole_documents() -> None:
    batch = make_batch(Cell("c", 4, 256, mean_length=40), 100, torch.Generator().manual_seed(0))
    assert batch.packed and batch.n_tokens > 0.9 * 4 * 256
    for ids, positions, labels in zip(batch.document_ids, batch.position_ids, batch.labels, strict=True):
        for document in ids[ids >= 0].unique():
            where = ids == document
            assert torch.equal(positions[where], torch.arange(int(where.sum())))
            assert labels[where][0] == IGNORE
    assert (batch.labels[batch.document_ids < 0] == IGNORE).all()


def test_document_lengths_have_the_mean_asked_for() -> None:
    lengths = document_lengths(300, 600_000, 4096, torch.Generator().manual_seed(0))
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.05)


def test_flops_of_a_known_shape() -> None:
    shape = CONFIG_MAPPING["llama"](**(tiny.ARCHITECTURES["llama"] | {"intermediate_size": 128}))
    base = random_base(shape, torch.device("cpu"), method="none", dtype=torch.float32)
    model = attach(base, LoraOptions(r=4, dtype=torch.float32), seed=0)
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    adapters = 2 * 4 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))
    expected = 4 * linear + 4 * 263 * 64 + 3.5 * 2 * 100 * 64 * 2 + 6 * adapters
    assert model_flops(model, shape, 100) == pytest.approx(expected)
