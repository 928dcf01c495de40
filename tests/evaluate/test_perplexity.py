import math

import pytest
import torch
import torch.nn.functional as F

from qlora_trainer.evaluate.perplexity import LossSum, evaluating, measure_loss
from qlora_trainer.model.forward import ReferenceForward
from tests import tiny
from tests.batches import collate, documents


def test_loss_equals_cross_entropy_written_out():
    model = tiny.model().eval()
    batch = collate([[d] for d in documents([9, 17, 5])], supervised_from=3)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    found = measure_loss(ReferenceForward(model), [batch])
    assert found.tokens == 6 + 14 + 2
    assert found.loss == pytest.approx(float(expected), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-6)


def test_parts_add_up_to_the_whole():
    model = tiny.model().eval()
    docs = documents([9, 17, 5, 30])
    forward = ReferenceForward(model)
    whole = measure_loss(forward, [collate([[d] for d in docs])])
    parts = [measure_loss(forward, [collate([[d]])]) for d in docs]
    total = sum(parts, LossSum())
    assert total.tokens == whole.tokens and total.weight == whole.weight
    assert total.loss == pytest.approx(whole.loss, abs=1e-6)


def test_nothing_supervised_is_nan_and_a_huge_loss_is_infinite():
    assert math.isnan(LossSum().perplexity)
    assert LossSum(nll=1e6, weight=1.0, tokens=1).perplexity == math.inf


def test_mode_is_restored_even_after_an_error():
    model = tiny.model().train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training
