"""The loss and gradients of a pack are the token-weighted ones of its documents run alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_trainer.data import Batch, Loader, TokenizedData
from qlora_trainer.data.loader import collate
from tests import tiny
from tests.data.conftest import ROWS, write_jsonl


def attention_mask(document_ids: Tensor) -> Tensor:
    """bool [B, 1, T, T]: causal, and only within a document (padding sees padding, so no row is empty)."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


def loss_sum(model: PreTrainedModel, batch: Batch, mask: Tensor | None) -> Tensor:
    """Sum over positions of weight times cross-entropy, as the loop's `forward` gives it."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none"
    )
    return (losses * batch.loss_weights[:, 1:].flatten()).sum()


@pytest.fixture
def data(load: Callable[..., TokenizedData], tmp_path: Path) -> TokenizedData:
    messages = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"][:20]},
                {"role": "assistant", "content": row["output"][:30], "weight": 1.0 + number % 3 / 2},
            ]
        }
        for number, row in enumerate(ROWS[:24])
    ]
    return load(write_jsonl(tmp_path / "chat.jsonl", messages))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_loss_equals_unpacked(data: TokenizedData, architecture: str) -> None:
    model = tiny.model(architecture, vocab_size=600, attn_implementation="sdpa").double()
    loader = Loader(
        data,
        micro_batch_size=2,
        accumulation=2,
        max_length=128,
        packing=True,
        group_by_length=False,
        seed=0,
        pad_id=0,
    )
    step = loader.step(0, 0)
    assert all(batch.packed for batch in step.micro_batches)
    packed = (
        sum(loss_sum(model, b, attention_mask(b.document_ids)) for b in step.micro_batches)
        / step.total_weight
    )
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows = [row for batch in step.micro_batches for row in batch.rows]
    alone = [collate(data, [torch.tensor([row]).numpy()], int(data.lengths[row]), 0) for row in rows]
    weights = sum(float(batch.loss_weights.sum()) for batch in alone)
    separate = sum(loss_sum(model, batch, None) for batch in alone) / weights
    separate.backward()

    assert len(rows) >= 8 and weights == pytest.approx(step.total_weight)
    torch.testing.assert_close(packed, separate, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12)


def test_without_isolation_the_losses_differ(data: TokenizedData) -> None:
    """The test above can fail: plain causal attention over a pack gives another loss."""
    model = tiny.model("llama", vocab_size=600, attn_implementation="sdpa").double()
    loader = Loader(
        data,
        micro_batch_size=2,
        accumulation=1,
        max_length=128,
        packing=True,
        group_by_length=False,
        seed=0,
        pad_id=0,
    )
    [batch] = loader.step(0, 0).micro_batches
    causal = torch.ones(batch.input_ids.shape[0], 1, 128, 128, dtype=torch.bool).tril()
    isolated = loss_sum(model, batch, attention_mask(batch.document_ids))
    assert abs(loss_sum(model, batch, causal) / isolated - 1) > 1e-6  # equality above is to 1e-12
