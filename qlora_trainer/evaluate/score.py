"""One evaluation: loss over held-out batches and answers to their questions, for base and tuned alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.match import match
from qlora_trainer.evaluate.perplexity import evaluating, measure_loss
from qlora_trainer.evaluate.report import Scores
from qlora_trainer.inference.generate import Sampling, generate
from qlora_trainer.inference.stop import pad_id
from qlora_trainer.model.forward import Forward
from qlora_trainer.model.residual import base_alone

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def score(
    model: PreTrainedModel | PeftModel,
    forward: Forward,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    adapters: bool = True,
) -> Scores:
    """Measures the tuned model, or without `adapters` its base alone.

    The loss comes through `forward`, whichever path that is; answers come from the model's own modules.
    """
    with evaluating(model):
        loss = measure_loss(forward, held_out.batches, model.device, adapters)
    if not held_out.questions:
        return Scores(loss)
    stops = list(stop_ids)
    with nullcontext() if adapters else base_alone(model):
        answers = generate(
            model, [q.prompt_ids for q in held_out.questions], stops, pad_id(tokenizer, stops), sampling
        )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    return Scores(loss, match(held_out.questions, texts))


def score_base_and_tuned(
    model: PeftModel,
    forward: Forward,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
) -> tuple[Scores, Scores]:
    """The same measurement of the base and of the tuned model."""
    of = (model, forward, held_out, tokenizer, stop_ids, sampling)
    return score(*of, adapters=False), score(*of)
