"""A chat template: how it renders, which tokens it is built of, and what it ends a turn with.

Comes in: Jinja text and a tokenizer, then messages or checked examples. Goes out: text, and `Rendering`s that
know where turns lie (`layout.py`). The end-of-turn token is decided here, for masks, for the adapter's
generation config and for every export: it is the first added token that the template puts behind the content
of a small answer, special or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.control import Controls, encode_texts
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.form import Form
from qlora_trainer.data.layout import Layout, Messages, Rendering, Tools
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.sandbox import Compiled, OverLimit, line_of
from qlora_trainer.errors import ConfigError


class NoConversationError(ConfigError):
    """A template that renders no plain question and answer."""


class ChatTemplate:
    """A Jinja chat template together with the special tokens it prints.

    Attributes:
        source: the Jinja text; it is stored with the adapter.
        origin: where it came from, for people.
        form: under which names, and how, it reads thoughts and calls.
        end_of_turn, end_text: id and text of the token that ends an assistant turn, or None if the template
            prints none (then `encode.py` appends EOS to the document).
        stop_token_ids: what generation has to stop at: end of turn and EOS.
        controls: its control tokens.
    """

    def __init__(self, source: str, origin: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.source = source
        self.origin = origin
        self._compiled = self._compile()
        self.constants = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.form = Form.of(lambda messages, tools: self.render(messages, tools=tools))
        self.controls: Controls | None = None
        self.end_text: str | None = None
        self.end_of_turn = self._probe(tokenizer)
        if self.end_of_turn is not None:
            self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn))
        ends = {self.end_of_turn, tokenizer.eos_token_id} - {None}
        self.stop_token_ids = tuple(sorted(ends))
        texts = [str(text) for text in tokenizer.convert_ids_to_tokens(list(self.stop_token_ids))]
        self.controls = Controls(source, self._plain(), texts, tokenizer)

    def render(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False, tools: Tools = None) -> str:
        """The text, as `tokenizer.apply_chat_template(tokenize=False)` gives it.

        One difference: a template that prints the date prints `sandbox.TODAY`, so that the same data are the
        same tokens tomorrow. Raises RowError where the template refuses the conversation or fails on it, with
        its own words and its line; ConfigError where it goes over the sandbox's limits.
        """
        return self.rendered(messages, prompt, tools)[0]

    def prompt(self, messages: Messages, tools: Tools = None) -> Rendering:
        """A conversation up to where the assistant speaks, as training shows it. Raises as `render` does."""
        text = self.render(messages, prompt=True, tools=tools)
        return Rendering(text, self.shadow(text, messages, tools, prompt=True))

    def tokenize(self, renderings: Sequence[Rendering]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character offsets of each rendering."""
        assert self.controls is not None
        return self.controls.tokenize([r.text for r in renderings], [r.shadow for r in renderings])

    def messages(self, messages: Sequence[Message]) -> Messages:
        """Messages in the form that this template reads."""
        return [self.form.message(message) for message in messages]

    def layout(self, example: Example) -> Rendering:
        """Render a conversation and find its turns. Raises RowError if the template hides them."""
        return Layout(self, example).rendering()

    def _plain(self) -> str:
        """Conversations of the usual roles, as text."""
        turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
        texts = []
        for start in (0, 1):
            try:
                texts.append(self.render(turns[start:]))
            except RowError:  # no system turns, say
                continue
        return "".join(texts)

    def shadow(self, full: str, messages: Messages, tools: Tools, prompt: bool = False) -> str:
        if self.controls is None:  # while the template is being probed
            return full
        return self.controls.text(
            full,
            messages,
            tools,
            lambda given, with_tools: self.render(given, prompt=prompt, tools=with_tools),
        )

    def _compile(self) -> Compiled:
        try:
            return Compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.template: {self.origin}, line {error.lineno}: {error.message}"
            ) from error
        except (SyntaxError, RecursionError, MemoryError) as error:  # of the Python that it becomes
            raise ConfigError(f"data.template: {self.origin}: nested too deeply to compile") from error

    def rendered(
        self, messages: Sequence[dict[str, Any]], prompt: bool, tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._compiled.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.constants,
            )
        except OverLimit as error:
            raise ConfigError(
                f"data.template: {self.place(error)}: stopped: it makes {error}; no chat template needs that"
            ) from error
        except jinja2.TemplateError as error:
            raise RowError(
                "messages", f"refused by the chat template ({self.place(error)}): {error}"
            ) from error
        except (
            Exception
        ) as error:  # a template is somebody's program: whatever Python raises can come out of it
            raise RowError(
                "messages",
                f"the chat template ({self.place(error)}) fails on it: {type(error).__name__}: {error}",
            ) from error

    def place(self, error: BaseException) -> str:
        """Where the template comes from, and the line that raised `error`."""
        line = line_of(error)
        return self.origin if line is None else f"{self.origin}, line {line}"

    def _probe(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The first added token behind the content of a small answer."""
        example = Example((Message("user", "a"), Message("assistant", "b")))
        try:
            rendering = self.layout(example)
        except RowError as error:
            raise NoConversationError(
                f"data.template: {self.origin} cannot render a question and an answer: {error}"
            ) from error
        stop = rendering.spans[-1].stop
        [(ids, offsets)] = encode_texts(tokenizer, [rendering.text])
        added = set(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id}
        tokens = list(zip(ids, offsets, strict=True))
        inside = [token for token, (start, end) in tokens if start < stop <= end and end > start]
        after = [token for token, (start, _) in tokens if start >= stop]
        return next((token for token in inside + after if token in added), None)
