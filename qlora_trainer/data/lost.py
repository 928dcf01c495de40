"""What a conversation holds and its rendering does not: content that the model would never see.

Comes in: an example and its rendering. Goes out: a `Loss` for each text that the template left out. A
template that does not know `tool_calls` renders a turn of nothing, whose end would be taught: the model would
learn silence where it should call. Compared are contents, names and arguments of calls, names, descriptions
and parameters of tools, thoughts, and the texts of every other key of a turn; what an assistant says is
looked for in its own turn. Ids and numbers of other keys are bookkeeping and not compared, nor are `null`s.

Templates trim, indent, escape and put parts under headings of their own, so a text is held if it stands there
as it is, as JSON writes it, or line by line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.example import THINKING, Example, Message
from qlora_trainer.data.layout import Rendering

SNIPPET = 40  # characters of a lost text in a message
THOUGHT_ENDS = "</think>"  # of a thought inside `content`


@dataclass(frozen=True)
class Loss:
    """A text that is not in the rendering.

    Attributes:
        field: where the row has it.
        what: its beginning, or what became of it.
        earlier: it is a thought of an earlier turn; many templates leave those out, as inference does.
    """

    field: str
    what: str
    earlier: bool = False


def losses(example: Example, rendering: Rendering, reads_thoughts: bool) -> Iterator[Loss]:
    """All of them, in order. `reads_thoughts`: the template has a place for what the model thinks."""
    regions = {span.message: rendering.text[span.opened : span.stop] for span in rendering.spans if span.turn}
    last = max(regions, default=-1)
    for at, tool in enumerate(example.tools or []):
        yield from _of_schema(tool, f"tools[{at}]", rendering.text)
    for at, message in enumerate(example.messages):
        text, field = regions.get(at, rendering.text), f"messages[{at}]"
        yield from _of_content(message, field, text, at in regions and at < last)
        for name, value in (message.extra or {}).items():
            if name == "tool_calls":
                for number, call in enumerate(value):
                    yield from _of_call(call["function"], f"{field}.tool_calls[{number}].function", text)
            elif name in THINKING:
                for loss in _of_tree(value, f"{field}.{name}", text):
                    yield Loss(loss.field, loss.what, reads_thoughts and at < last)
            elif not _is_bookkeeping(name):
                yield from _of_tree(value, f"{field}.{name}", rendering.text)


def held(piece: str, text: str) -> bool:
    """Whether a text stands in another, as it is or as templates write texts."""
    piece = piece.strip()
    if piece in text:
        return True
    if any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    return all(line.strip() in text for line in piece.splitlines())


def _of_content(message: Message, field: str, text: str, earlier: bool) -> Iterator[Loss]:
    content = message.content
    if held(content, text):
        return
    thought, ends, said = content.rpartition(THOUGHT_ENDS)
    if not ends or not held(said, text):
        yield Loss(f"{field}.content", _snippet(said if ends else content))
    elif not held(thought.rpartition("<think>")[2], text):
        yield Loss(f"{field}.content", _snippet(content), earlier)


def _of_call(function: dict[str, Any], field: str, text: str) -> Iterator[Loss]:
    if not held(function["name"], text):
        yield Loss(f"{field}.name", _snippet(function["name"]))
    arguments = function["arguments"]
    yield from _of_tree(arguments, f"{field}.arguments", text, names=True)
    as_json = json.dumps(arguments, ensure_ascii=False)
    if str(arguments) in text and as_json not in text:  # a thought may hold Python's words beside the call
        yield Loss(
            f"{field}.arguments", f"{_snippet(str(arguments))} as JSON (it is there as Python writes it)"
        )


def _of_schema(tool: dict[str, Any], field: str, text: str) -> Iterator[Loss]:
    """What a schema says to a model: names, descriptions, parameters, choices. Types have many spellings."""
    for name, value in tool.items():
        at = f"{field}.{name}"
        if (name in ("name", "description") and isinstance(value, str)) or name == "enum":
            yield from _of_tree(value, at, text)
        elif name == "properties" and isinstance(value, dict):
            for parameter, schema in value.items():
                if not held(parameter, text):
                    yield Loss(f"{at}.{parameter}", _snippet(parameter))
                if isinstance(schema, dict):
                    yield from _of_schema(schema, f"{at}.{parameter}", text)
        elif isinstance(value, dict):
            yield from _of_schema(value, at, text)


def _of_tree(value: Any, field: str, text: str, names: bool = False) -> Iterator[Loss]:
    """Texts of a tree of plain values; with `names`, its keys, numbers and truths too."""
    if isinstance(value, str):
        if not held(value, text):
            yield Loss(field, _snippet(value))
    elif isinstance(value, dict):
        for name, item in value.items():
            if names and not held(name, text):
                yield Loss(f"{field}.{name}", _snippet(name))
            elif names or not _is_bookkeeping(name):
                yield from _of_tree(item, f"{field}.{name}", text, names)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _of_tree(item, f"{field}[{at}]", text, names)
    elif names and value is not None and json.dumps(value) not in text and str(value) not in text:
        yield Loss(field, str(value))


def _is_bookkeeping(name: str) -> bool:
    return name in ("id", "type") or name.endswith("_id")


def _snippet(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= SNIPPET else words[:SNIPPET] + "…")
