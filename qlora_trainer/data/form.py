"""The form in which a chat template reads what people say beside `content`: thoughts and calls of tools.

Comes in: a way to render, and messages as the data have them. Goes out: messages under the names, and in the
form, that this template reads. Nothing in a template states them, so they are found by rendering small
conversations: what the text then holds was read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.example import THINKING, Message
from qlora_trainer.data.problems import RowError

THOUGHT, KEY, VALUE = "qlora-thought", "qlora_key", "qlora-value"
ARGUMENTS = {KEY: VALUE}
AS_TEXT = json.dumps(ARGUMENTS)
TOOL = {
    "type": "function",
    "function": {
        "name": "qlora_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A value."}}},
    },
}
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]  # messages, tools -> text


@dataclass(frozen=True)
class Form:
    """What one template reads.

    Attributes:
        thinking: the key (of THINKING) under which it reads what the model thinks; None if it reads none.
        arguments_as_text: whether it prints the arguments of a call as they are, so that they have to be JSON
            text. Otherwise it takes them as an object, as transformers documents.
    """

    thinking: str | None
    arguments_as_text: bool

    @classmethod
    def of(cls, render: Render) -> Form:
        """The form of the template behind `render`."""
        thought = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        reads = (
            name for name in THINKING if THOUGHT in _tried(render, [thought[0], thought[1] | {name: THOUGHT}])
        )
        as_object, as_text = (_tried(render, _called(given), [TOOL]) for given in (ARGUMENTS, AS_TEXT))
        printed = VALUE not in as_object or str(ARGUMENTS) in as_object  # refused, or in Python's words
        takes_text = AS_TEXT in as_text and repr(AS_TEXT) not in as_text
        return cls(next(reads, None), printed and takes_text)

    def message(self, message: Message) -> dict[str, Any]:
        """A message as this template reads it."""
        given = message.for_template()
        if message.extra is None:
            return given
        thoughts = [name for name in THINKING if given.get(name)]
        if self.thinking and thoughts and self.thinking not in thoughts:
            given[self.thinking] = given.pop(thoughts[0])
        if self.arguments_as_text and "tool_calls" in given:
            given["tool_calls"] = [_with_text(call) for call in given["tool_calls"]]
        return given


def _tried(render: Render, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    try:
        return render(messages, tools)
    except RowError:
        return ""


def _called(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "qlora0001", "function": {"name": "qlora_tool", "arguments": arguments}}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "c", "name": "qlora_tool", "tool_call_id": "qlora0001"},
        {"role": "assistant", "content": "b"},
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
