"""Held-out rows as questions: the last answer of each document, and everything before it as the prompt.

Made from token ids and labels, so whatever format and template the rows came from, the prompt is
exactly what training showed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.evaluate.match import Question


def questions(
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    limit: int | None = None,
) -> list[Question]:
    """One question a document, in order; documents without a prompt or an answer give none."""
    found: list[Question] = []
    for input_ids, labels in documents(batches):
        if limit is not None and len(found) >= limit:
            break
        start = answer_start(labels)
        answer = [token for token in input_ids[start:] if token not in stop_ids]
        reference = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        if start > 0 and reference:
            prompt = str(tokenizer.decode(input_ids[:start], skip_special_tokens=True)).strip()
            found.append(Question(tuple(input_ids[:start]), reference, prompt))
    return found


def documents(batches: Iterable[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each document, padding and packing undone."""
    for batch in batches:
        for row, ids in enumerate(batch.document_ids):
            for document in range(int(ids.max()) + 1):
                where = ids == document
                yield batch.input_ids[row, where].tolist(), batch.labels[row, where].tolist()


def answer_start(labels: Sequence[int]) -> int:
    """Where the last run of supervised tokens begins; the document's length if there is none."""
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE:
        start -= 1
    return start if end else len(labels)
