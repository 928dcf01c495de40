"""Supervised fine-tuning: the weighted cross-entropy of the supervised tokens."""

from __future__ import annotations

from torch import Tensor

from qlora_trainer.model.forward import TokenNll


def sft(tokens: TokenNll) -> Tensor:
    """Sum of weight · nll over the micro-batch, float32 scalar."""
    return (tokens.nll * tokens.weights).sum()
