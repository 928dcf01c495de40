"""Held-out rows, once as batches for the loss and once as questions for the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data import Batch, TokenizedData
from qlora_trainer.data.loader import collate
from qlora_trainer.evaluate.match import Question


@dataclass(frozen=True)
class HeldOut:
    """What is measured on.

    Attributes:
        batches: padded rows, in memory: base and tuned see the same.
        questions: what to ask; empty where there is no task.
    """

    batches: Sequence[Batch]
    questions: Sequence[Question] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        data: TokenizedData,
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
        *,
        task: str = "none",
        max_rows: int | None = None,
        batch_size: int = 8,
    ) -> HeldOut:
        """The first `max_rows` documents (all by default), and their prompts if there is a task.

        Args:
            task: none | exact_match, which asks for each document's last answer.
            batch_size: documents in a batch; those of like length share one, so little is padding.
        """
        rows = np.argsort(data.lengths[:max_rows], kind="stable")
        batches = [
            collate(data, list(group.reshape(-1, 1)), int(data.lengths[group].max()), pad_id)
            for group in np.array_split(rows, -(-len(rows) // batch_size))
        ]
        if task == "none":
            return cls(batches)
        asked = [
            Question(
                prompt_ids=tuple(prompt.ids),
                reference=prompt.reference,
                text=str(tokenizer.decode(prompt.ids, skip_special_tokens=True)).strip(),
                source=prompt.where.rpartition(":")[0],
            )
            for prompt in data.prompts(tokenizer, max_rows)
        ]
        return cls(batches, asked)
