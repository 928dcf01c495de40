"""Which tokens end an answer: the end of sequence, and whatever the chat template closes a turn with.

A model that was tuned to say `<|im_end|>` but is stopped only at `</s>` never stops talking, so the
set travels with every export.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_ids(tokenizer: PreTrainedTokenizerBase, defaults: GenerationConfig | None = None) -> list[int]:
    """Ids that end an answer, sorted: the tokenizer's, the model's own `defaults`, the template's."""
    found = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    if defaults is not None:
        stored = defaults.eos_token_id
        found.update(stored if isinstance(stored, Iterable) else [stored])
    return sorted(token for token in found if token is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts directly after an assistant's words, if any.

    Found by rendering a conversation, for no field of a tokenizer states it.
    """
    if not tokenizer.chat_template:
        return None
    answer = "qlora-answer"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}], tokenize=False
    )
    assert isinstance(rendered, str)
    if answer not in rendered:
        return None
    tail = rendered.rpartition(answer)[2].lstrip()
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for token, i in special.items() if tail.startswith(token)), None)


def pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """What fills a short row; generation masks it, so a stop token serves where there is no pad token."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0
