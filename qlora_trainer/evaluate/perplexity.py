"""Loss and perplexity on labelled tokens: the same sum the trainer minimises, over held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora_trainer.data.batch import Batch
from qlora_trainer.model.forward import Forward
from qlora_trainer.objectives.sft import sft


@dataclass(frozen=True)
class LossSum:
    """Weighted negative log-likelihood in nats, kept as sums so that parts and ranks simply add up.

    Attributes:
        nll: sum over supervised tokens of weight times cross-entropy.
        weight: sum of those weights.
        tokens: how many tokens carried a label.
    """

    nll: float = 0.0
    weight: float = 0.0
    tokens: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.nll + other.nll, self.weight + other.weight, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per unit of weight; NaN when nothing was supervised."""
        return self.nll / self.weight if self.weight else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that exceeds a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def measure_loss(
    forward: Forward, batches: Iterable[Batch], device: torch.device | str = "cpu", adapters: bool = True
) -> LossSum:
    """Adds up `forward` over `batches` in float64, without gradients.

    Args:
        batches: held-out batches; each is moved to `device`.
        adapters: False measures the base alone.

    The caller puts the model into evaluation mode (see `evaluating`), or dropout stays on.
    """
    total = LossSum()
    with torch.no_grad():
        for batch in batches:
            nll = float(sft(forward(batch.to(device), adapters)))
            # The first position has no predecessor, so no loss is taken there whatever its weight says.
            weight = float(batch.loss_weights[:, 1:].sum(dtype=torch.float64))
            total += LossSum(nll, weight, batch.n_supervised)
    return total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards whatever mode the model was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
