"""Chat templates: which one applies, how it renders, and where in the rendering each turn's text lies.

Comes in: a tokenizer and checked messages. Goes out: `Rendering`s, text plus character spans of what the
assistant says. Tokens come later (`encode.py`); nothing here searches for role markers.

Most stock templates carry no `{% generation %}` tag, so spans are found by rendering, and proved:

* A turn *starts* where the generation prompt ends: `render(messages[:i], add_generation_prompt=True)`
  is exactly what the model is given at inference. It has to be a prefix of the full rendering. Where it is
  not (a template that opens the model's turn with `<think>` and later strips it), the turn starts at its
  content, found by a mark.
* Content *ends* at a mark put behind its last visible character. Trimming templates do not move it, and
  taking all marks out has to give the full rendering again, character for character.
* The end-of-turn token is the first added token that the template puts behind the content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.sandbox import Compiled, OverLimit, line_of
from qlora_trainer.errors import ConfigError

MARKS = tuple((chr(0xE000 + 2 * n), chr(0xE001 + 2 * n)) for n in range(8))  # private use: no text has them


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a rendering that one message put there, and which message.

    `turn` tells an assistant's whole turn (to be extended to its end-of-turn token) from bare content.
    """

    start: int
    stop: int
    message: int
    turn: bool


@dataclass(frozen=True)
class Rendering:
    """A conversation as one text, its spans in order, and whether inference gives the same prompts.

    `as_prompted` is False if some turn's generation prompt is not what stands before it here: the template
    shows the model another conversation at inference than in training.
    """

    text: str
    spans: tuple[Span, ...]
    as_prompted: bool = True


class ChatTemplate:
    """A Jinja chat template together with the special tokens it prints.

    Attributes:
        source: the Jinja text; it is stored with the adapter.
        origin: where it came from, for people.
        end_of_turn: id of the token that ends an assistant turn, or None if the template prints none
            (then `encode.py` appends EOS to the document).
        stop_token_ids: what generation has to stop at: end of turn and EOS.
    """

    def __init__(self, source: str, origin: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.source = source
        self.origin = origin
        self._compiled = self._compile()
        self.constants = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.end_of_turn = self._probe(tokenizer)
        stops = {self.end_of_turn, tokenizer.eos_token_id} - {None}
        self.stop_token_ids = tuple(sorted(stops))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The text, as `tokenizer.apply_chat_template(tokenize=False)` gives it.

        One difference: a template that prints the date prints `sandbox.TODAY`, so that the same data are the
        same tokens tomorrow. Raises RowError where the template refuses the conversation or fails on it, with
        its own words and its line; ConfigError where it goes over the sandbox's limits.
        """
        return self._render(messages, prompt, tools)[0]

    def layout(self, example: Example) -> Rendering:
        """Render a conversation and find its turns. Raises RowError if the template hides them."""
        messages = [message.for_template() for message in example.messages]
        full, blocks = self._render(messages, False, example.tools)
        turns = [at for at, message in enumerate(example.messages) if message.role == "assistant"]
        prompts = [self.render(messages[:at], prompt=True, tools=example.tools) for at in turns]
        as_prompted = all(full.startswith(prompt) for prompt in prompts)
        spans = self._tagged_spans(blocks, turns)
        if spans is None:
            spans = self._proved_spans(messages, example, turns, prompts, full)
        others = [
            at for at, m in enumerate(example.messages) if m.role != "assistant" and m.weight is not None
        ]
        if others:
            marks = [(at, edge) for at in others for edge in (False, True)]
            found = self._locate(messages, marks, full, example.tools)
            for at in others:
                if (at, False) not in found or (at, True) not in found:
                    raise RowError(f"messages[{at}]", "has a weight, but the chat template rewrites its text")
                spans.append(Span(found[at, False], found[at, True], at, turn=False))
        return Rendering(full, tuple(sorted(spans, key=lambda span: span.start)), as_prompted)

    def _proved_spans(
        self,
        messages: list[dict[str, Any]],
        example: Example,
        turns: list[int],
        prompts: list[str],
        full: str,
    ) -> list[Span]:
        visible = [at for at in turns if messages[at]["content"].strip()]  # a mark would make emptiness text
        ends = self._locate(messages, [(at, True) for at in visible], full, example.tools)
        spans = []
        for at, prompt in zip(turns, prompts, strict=True):
            stop = ends.get((at, True))
            if full.startswith(prompt) and (stop is None or len(prompt) <= stop):
                start: int | None = len(prompt)
            else:
                start = self._locate(messages, [(at, False)], full, example.tools).get((at, False))
            if stop is None and full.startswith(
                whole := self.render(messages[: at + 1], tools=example.tools)
            ):
                stop = len(whole)
            if start is None or stop is None:
                raise RowError(
                    f"messages[{at}]",
                    "the chat template rewrites this turn so that its place cannot be told; "
                    "mark it with {% generation %} in a template of your own (data.template=FILE)",
                )
            spans.append(Span(start, stop, at, turn=True))
        return spans

    def _tagged_spans(self, blocks: list[tuple[int, int]], turns: list[int]) -> list[Span] | None:
        """The template's own {% generation %} blocks, if there is one for each assistant turn."""
        if not blocks or len(blocks) != len(turns):
            return None
        return [Span(start, stop, at, turn=True) for at, (start, stop) in zip(turns, blocks, strict=True)]

    def _compile(self) -> Compiled:
        try:
            return Compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.template: {self.origin}, line {error.lineno}: {error.message}"
            ) from error
        except (SyntaxError, RecursionError, MemoryError) as error:  # of the Python that it becomes
            raise ConfigError(f"data.template: {self.origin}: nested too deeply to compile") from error

    def _render(
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

    def _locate(
        self,
        messages: list[dict[str, Any]],
        marks: list[tuple[int, bool]],
        full: str,
        tools: list[dict[str, Any]] | None,
    ) -> dict[tuple[int, bool], int]:
        """Where the visible content of messages starts (False) and ends (True) in `full`.

        Renders once with a mark at each place; a mark that the template drops or repeats is left out, and
        so is everything if the rest does not equal `full`.
        """
        said = "".join(message["content"] for message in messages)
        free = [pair for pair in MARKS if pair[0] not in full and pair[0] not in said]
        if not free:
            return {}
        left, right = free[0]
        marked = [dict(message) for message in messages]
        for number, (at, is_end) in reversed(list(enumerate(marks))):
            content = marked[at]["content"]
            bare = content.rstrip() if is_end else content.lstrip()
            cut = len(bare) if is_end else len(content) - len(bare)
            marked[at]["content"] = f"{content[:cut]}{left}{number}{right}{content[cut:]}"
        text = self.render(marked, tools=tools)
        pattern = re.compile(f"{left}(\\d+){right}")
        if pattern.sub("", text) != full:
            return {}
        found: dict[tuple[int, bool], int] = {}
        removed = 0
        repeated = set()
        for match in pattern.finditer(text):
            mark = marks[int(match[1])]
            repeated |= {mark} & found.keys()
            found[mark] = match.start() - removed
            removed += len(match[0])
        return {mark: place for mark, place in found.items() if mark not in repeated}

    def _probe(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The first added token behind the content of a small answer."""
        example = Example((Message("user", "a"), Message("assistant", "b")))
        try:
            rendering = self.layout(example)
        except RowError as error:
            raise ConfigError(
                f"data.template: {self.origin} cannot render a question and an answer: {error}"
            ) from error
        stop = rendering.spans[-1].stop
        encoded = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
        added = set(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id}
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        inside = [token for token, (start, end) in tokens if start < stop <= end and end > start]
        after = [token for token, (start, _) in tokens if start >= stop]
        return next((token for token in inside + after if token in added), None)
