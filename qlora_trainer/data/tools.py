"""Tool schemas and tool calls: every form that people keep them in, read into the one that templates read.

That form is the one transformers documents for `apply_chat_template`:

    tools        [{"type": "function", "function": {"name", "description", "parameters"}}, …]
    tool_calls   [{"type": "function", "function": {"name", "arguments": {…}}}, …]

`arguments` are an object: templates walk it with `|items` or print it with `|tojson`, and a text would be
refused by the one and encoded a second time by the other. Read into it: JSON text in place of any list or
object (OpenAI's wire form, LLaMA-Factory's `tools` column, Parquet columns of text), schemas and calls
without the outer `function`, OpenAI's old `function_call`, and calls that are the text of a turn (ShareGPT).
"""

from __future__ import annotations

import json
import re
from typing import Any

from qlora_trainer.data.problems import RowError, kind
from qlora_trainer.system.untrusted import parse_json

THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)


def unpacked(value: Any, field: str) -> Any:
    """`value`, or what it says if it is JSON text, however often it was encoded. Raises RowError."""
    while isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            where = f"broken at column {error.colno}: " if isinstance(error, json.JSONDecodeError) else ""
            what = where + getattr(error, "msg", str(error))
            if re.match(r"\s*[\[{(]+\s*('|\))", value):
                what = "not JSON but Python's repr"
            raise RowError(
                field, f"expected JSON, found text that is {what}; write it with json.dumps"
            ) from error
    return value


def schemas(value: Any, field: str) -> list[dict[str, Any]] | None:
    """The `tools` of a row. Raises RowError."""
    tools = unpacked(value, field) or None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(field, f"expected a list of objects, found {kind(tools)}")
    return [_schema(tool, f"{field}[{at}]") for at, tool in enumerate(tools)]


def _schema(value: Any, field: str) -> dict[str, Any]:
    tool = unpacked(value, field)
    if not isinstance(tool, dict):
        raise RowError(field, f"expected an object, found {kind(tool)}")
    if "function" in tool:
        return tool | {"function": unpacked(tool["function"], f"{field}.function")}
    if isinstance(tool.get("name"), str) and tool.get("type", "function") == "function":
        return {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
    return tool  # a tool of another type: the template may know it


def calls(value: Any, field: str) -> list[dict[str, Any]]:
    """The `tool_calls` of a turn: a list, or one call by itself. Raises RowError."""
    given = unpacked(value, field)
    if given is None:
        return []
    if isinstance(given, dict):
        return [_call(given, field)]
    if not isinstance(given, list):
        raise RowError(field, f"expected a list of calls, found {kind(given)}")
    return [_call(call, f"{field}[{at}]") for at, call in enumerate(given)]


def _call(value: Any, field: str) -> dict[str, Any]:
    call = unpacked(value, field)
    if not isinstance(call, dict):
        raise RowError(field, f"expected an object, found {kind(call)}")
    if "function" not in call:  # {"name": …, "arguments": …}
        outer = {key: call[key] for key in ("id", "index") if key in call}
        call = {
            "type": "function",
            **outer,
            "function": {key: call[key] for key in call if key not in ("type", *outer)},
        }
    at = f"{field}.function"
    function = unpacked(call["function"], at)
    if not isinstance(function, dict):
        raise RowError(at, f"expected an object, found {kind(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"{at}.name", f"expected the tool's name, found {kind(name)}")
    key = "parameters" if "parameters" in function and "arguments" not in function else "arguments"
    arguments = unpacked(function.get(key), f"{at}.{key}")
    if not isinstance(arguments, dict | None):
        raise RowError(f"{at}.{key}", f"expected an object, found {kind(arguments)}")
    if key == "parameters":
        function = {other: function[other] for other in function if other != key}
    return call | {"function": function | {"arguments": arguments or {}}}


def spoken(text: Any, field: str) -> tuple[str, list[dict[str, Any]]]:
    """What a turn says whose text is a call, or a list of them: a thought before them, and the calls.

    Raises RowError.
    """
    thought = THOUGHT.match(text) if isinstance(text, str) else None
    rest = text[thought.end() :] if thought else text
    try:
        found = calls(rest, field)
    except RowError as error:
        problem = error.problem
        raise RowError(
            problem.field,
            f'{problem.text} (the turn is a call: {{"name": …, "arguments": {{…}}}}; give text another role)',
        ) from error
    return (thought[1] if thought else ""), found
