"""Batched text generation with any transformers or PEFT model: token ids in, token ids out.

Prompts are padded on the left with a mask, so that every row's last token is its own and the rows
of a batch do not see each other's padding. Rows of similar length share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from qlora_trainer.model.limits import limits_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens per answer at most.
        temperature: 0 is greedy; otherwise logits are divided by it and sampled.
        top_p: sample from the smallest set of tokens that holds this much probability.
        batch_size: prompts decoded together.
        seed: of the sampling; greedy decoding ignores it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0

    def config(self, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """The same as transformers has it; nothing is inherited from the model's own defaults."""
        how: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            how = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
            **how,
        )


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Answers to `prompts`, in their order: the new token ids before the first stop token.

    An answer ends where the model's table of positions does, if it has one.

    Args:
        model: in any mode; it generates in evaluation mode and is put back.
        prompts: non-empty lists of token ids.
        stop_ids: any of these ends an answer and is not part of it.
        pad_id: fills short prompts on the left; may be a stop token, for padding is masked.
    """
    sampling = sampling or Sampling()
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    with _decoding(model, sampling.config(stop_ids, pad_id)) as config:
        torch.manual_seed(sampling.seed)
        limits = limits_of(model)
        for start in range(0, len(order), sampling.batch_size):
            rows = order[start : start + sampling.batch_size]
            input_ids, mask = pad_left([prompts[row] for row in rows], pad_id)
            config.max_new_tokens = limits.room(input_ids.shape[1], sampling.max_new_tokens)
            if not config.max_new_tokens:
                continue
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
            for row, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
                answers[row] = ids[:end]
    return answers


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`rows` as int64 [B, T], padded on the left, and their mask int64 [B, T]: 1 on real tokens."""
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return input_ids, mask


@contextmanager
def _decoding(model: Any, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """Evaluation mode, no gradients, and only our settings: `generate` would fill the gaps with the model's.

    The model's random generator is left as it was found, for training resumes from it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, own = model.training, base.generation_config
    base.generation_config = config
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices):
            yield config
    finally:
        base.generation_config = own
        model.train(training)
