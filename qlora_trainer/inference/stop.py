"""Which tokens end an answer: the end of sequence, and whatever the chat template closes a turn with.

A model that was tuned to say `<|im_end|>` but is stopped only at `</s>` never stops talking, so the set
travels with every export. What a turn ends with is decided in one place, `data.chat.ChatTemplate`, which
masks are made from: generation stops at what training taught.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_trainer.data.chat import ChatTemplate, NoConversationError
from qlora_trainer.data.templates import template_source


def stop_ids(tokenizer: PreTrainedTokenizerBase, defaults: GenerationConfig | None = None) -> list[int]:
    """Ids that end an answer, sorted: the tokenizer's, the model's own `defaults`, the template's."""
    found = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    if defaults is not None:
        stored = defaults.eos_token_id
        found.update(stored if isinstance(stored, Iterable) else [stored])
    return sorted(token for token in found if token is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer's chat template ends an assistant's turn with, if any.

    None for a template that renders no plain question and answer: what it ends with cannot be told. Raises
    ConfigError for one that is not Jinja or goes over the sandbox's limits.
    """
    found = template_source(None, tokenizer)
    if found is None:
        return None
    try:
        return ChatTemplate(*found, tokenizer).end_of_turn
    except NoConversationError:
        return None


def pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """What fills a short row; generation masks it, so a stop token serves where there is no pad token."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0
