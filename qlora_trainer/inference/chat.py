"""A conversation in the terminal: history kept, answers streamed, the training template applied.

In: a model, its tokenizer and lines of text (a keyboard or a pipe). Out: text as it is generated.
`/reset` forgets the conversation, `/quit` or the end of input leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.templates import template_source
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.inference.generate import Sampling
from qlora_trainer.inference.load import Loaded
from qlora_trainer.inference.stop import pad_id
from qlora_trainer.model.limits import limits_of

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatOptions:
    """How to answer; `system` opens every conversation if given."""

    sampling: Sampling
    system: str | None = None


class Chat:
    """One conversation with one model.

    Args:
        loaded: from `inference.load.load`.
        write: takes each piece of an answer as soon as it is certain.

    Raises:
        ConfigError: the tokenizer has no chat template, or it refuses the conversation.
    """

    def __init__(self, loaded: Loaded, options: ChatOptions, write: Callable[[str], None]) -> None:
        found = template_source(None, loaded.tokenizer)
        if found is None:
            raise ConfigError(
                "chat: this model has no chat template; train with data.template=<name or jinja file>, "
                "which stores it with the adapter"
            )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.template = ChatTemplate(*found, loaded.tokenizer)
        self.config: GenerationConfig = options.sampling.config(
            loaded.stop_ids, pad_id(loaded.tokenizer, loaded.stop_ids)
        )
        self.limits, self.max_new_tokens = limits_of(loaded.model), options.sampling.max_new_tokens
        self.write = write
        self._opening = [{"role": "system", "content": options.system}] if options.system else []
        self.messages: list[Message] = []
        self.reset()
        torch.manual_seed(options.sampling.seed)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._opening)

    def say(self, text: str) -> str:
        """The answer to `text`, streamed to `write` and added to the history.

        Interrupted from the keyboard, the turn is taken back whole.

        Raises:
            DataError: a token of it has no row in the model's embedding, or the conversation no position.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        prompt = prompt_ids(self.template, turn)
        self._require_place(prompt)
        ids = torch.tensor([prompt], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.config,
                streamer=_Pieces(self.tokenizer, self.write),
            )
        answer = str(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        self.messages = [*turn, {"role": "assistant", "content": answer}]
        return answer

    def _require_place(self, prompt: list[int]) -> None:
        if self.limits.rows is not None and (largest := max(prompt)) >= self.limits.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"chat: {token!r} is token {largest}, and the model's embedding has {self.limits.rows:,} rows"
            )
        self.config.max_new_tokens = self.limits.room(len(prompt), self.max_new_tokens)
        if not self.config.max_new_tokens:
            raise DataError(
                f"chat: the conversation has {len(prompt):,} tokens and the model {self.limits.trained:,} "
                "positions: /reset begins anew"
            )

    def run(self, lines: Iterable[str]) -> None:
        """Answers line after line until they end or say `/quit`; empty lines are passed over."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text == "/reset":
                self.reset()
            elif text:
                with suppress(KeyboardInterrupt):  # stops this answer, not the conversation
                    self.say(text)
                self.write("\n")


def prompt_ids(template: ChatTemplate, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks, exactly as in training.

    The text of control tokens in what is said is text, and a date is training's. Raises ConfigError where the
    template refuses the conversation.
    """
    try:
        rendering = template.prompt(messages)
    except RowError as error:
        raise ConfigError(f"chat: {error}") from error
    [(ids, _)] = template.tokenize([rendering])
    return ids


class _Pieces(TextStreamer):
    """Hands each finished piece of text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
