"""Calls and schemas in every form that people keep them are read into the one that templates read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_trainer.data.example import Example
from qlora_trainer.data.formats import detect, reader
from qlora_trainer.data.problems import RowError

FUNCTION = {"name": "weather", "description": "Weather of a town", "parameters": {"type": "object"}}
SCHEMA = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"town": "Ulm", "days": None}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": ARGUMENTS}}
BARE = {"name": "weather", "arguments": ARGUMENTS}
WRAPPED = {"type": "function", "function": BARE}


def read(row: dict[str, Any]) -> Example:
    return reader(detect(row, "f:1"), {})(row)


def openai(answer: dict[str, Any], **columns: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "Will it rain?"}
    told = {"role": "tool", "content": '{"rain": true}', "tool_call_id": "c1"}
    return {
        "messages": [asked, {"role": "assistant", **answer}, told, {"role": "assistant", "content": "Yes."}]
    } | columns


def text(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as JSON text, as OpenAI sends it."""
    function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}
    return call | {"function": function}


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as documented": ({"content": "", "tool_calls": [CALL]}, CALL),
    "no content": ({"tool_calls": [CALL]}, CALL),
    "null content": ({"content": None, "tool_calls": [CALL]}, CALL),
    "arguments as text": ({"content": "", "tool_calls": [text(CALL)]}, CALL),
    "arguments encoded twice": ({"content": "", "tool_calls": [text(text(CALL))]}, CALL),
    "all as text": ({"content": "", "tool_calls": json.dumps([text(CALL)])}, CALL),
    "each as text": ({"content": "", "tool_calls": [json.dumps(CALL)]}, CALL),
    "without function": ({"content": "", "tool_calls": [BARE]}, WRAPPED),
    "parameters": ({"tool_calls": [{"name": "weather", "parameters": ARGUMENTS}]}, WRAPPED),
    "old function_call": ({"content": None, "function_call": text(WRAPPED)["function"]}, WRAPPED),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_objects_whatever_their_form(name: str) -> None:
    answer, expected = CALLS[name]
    _, called, told, _ = read(openai(answer)).messages
    assert called.for_template() == {"role": "assistant", "content": "", "tool_calls": [expected]}
    assert told.for_template()["tool_call_id"] == "c1"


@pytest.mark.parametrize("nothing", ["", None, "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(nothing: Any) -> None:
    call = {"function": {"name": "now", "arguments": nothing}}
    _, called, *_ = read(openai({"tool_calls": [call]})).messages
    assert called.for_template()["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize(
    "tools", [[SCHEMA], [FUNCTION], json.dumps([SCHEMA]), json.dumps([FUNCTION]), [json.dumps(SCHEMA)]]
)
def test_schemas_are_wrapped_objects_whatever_their_form(tools: Any) -> None:
    assert read(openai({"tool_calls": [CALL]}, tools=tools)).tools == [SCHEMA]


@pytest.mark.parametrize("nothing", ["", "[]", [], None])
def test_a_row_may_have_no_tools(nothing: Any) -> None:
    assert read(openai({"content": "a"}, tools=nothing)).tools is None


def test_other_tools_and_openais_old_column_are_kept() -> None:
    search = {"type": "web_search", "name": "search"}
    assert read(openai({"content": "a"}, tools=[search])).tools == [search]
    assert read(openai({"content": "a"}, functions=[FUNCTION])).tools == [SCHEMA]


def test_turns_of_sharegpt_that_are_calls_become_calls() -> None:
    """LLaMA-Factory's form: `function_call` and `observation` turns, `tools` as JSON text."""
    row = {
        "conversations": [
            {"from": "human", "value": "Will it rain?"},
            {"from": "function_call", "value": json.dumps(BARE)},
            {"from": "observation", "value": '{"rain": true}'},
            {
                "from": "function_call",
                "value": "<think>\nTwice.\n</think>\n" + json.dumps([BARE, text(WRAPPED)]),
            },
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([FUNCTION]),
        "system": "Be brief.",
    }
    example = read(row)
    assert example.tools == [SCHEMA]
    assert [turn.for_template() for turn in example.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "", "tool_calls": [WRAPPED]},
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "assistant", "content": "<think>\nTwice.\n</think>", "tool_calls": [WRAPPED, WRAPPED]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "Yes."},
    ]
    other = {
        "messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": json.dumps(BARE)}]
    }
    assert read(other).messages[1].for_template()["tool_calls"] == [WRAPPED]


def test_parts_of_a_content_may_be_thoughts_and_calls() -> None:
    """LLaMA-Factory's second form: a list of parts under `value`."""
    said = [
        {"type": "reasoning", "value": "Look it up."},
        {"type": "text", "value": "A moment."},
        {"type": "tool_call", "value": json.dumps(BARE)},
        {"type": "tool_call", "value": json.dumps(BARE)},
    ]
    _, called, *_ = read(openai({"content": said})).messages
    assert called.for_template() == {
        "role": "assistant",
        "content": "A moment.",
        "reasoning_content": "Look it up.",
        "tool_calls": [WRAPPED, WRAPPED],
    }
    alone = [{"type": "thinking", "thinking": "Hm."}]
    assert read(openai({"content": alone})).messages[1].for_template()["reasoning_content"] == "Hm."


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "arguments": (
        openai({"tool_calls": [{"function": {"name": "f", "arguments": "Ulm, 2"}}]}),
        r"messages\[1\].tool_calls\[0\].function.arguments: expected JSON.*column 1.*json.dumps",
    ),
    "repr": (
        openai({"tool_calls": [{"function": {"name": "f", "arguments": "{'town': 'Ulm'}"}}]}),
        "not JSON but Python's repr; write it with json.dumps",
    ),
    "list of arguments": (
        openai({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        "function.arguments: expected an object, found a list",
    ),
    "no name": (openai({"tool_calls": [{"function": {"arguments": {}}}]}), "name: expected the tool's name"),
    "no call": (openai({"tool_calls": [1]}), r"tool_calls\[0\]: expected an object, found a number"),
    "tools": (openai({"content": "a"}, tools="weather"), "tools: expected JSON"),
    "a tool": (openai({"content": "a"}, tools=[1]), r"tools\[0\]: expected an object, found a number"),
    "tools of a kind": (openai({"content": "a"}, tools={"a": 1}), "tools: expected a list of objects"),
    "text as call": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "I call."}]},
        r"conversations\[1\].value: expected JSON.*the turn is a call.*give text another role",
    ),
    "surrogate": (
        openai({"tool_calls": [{"function": {"name": "f", "arguments": {"a": ["\ud83d"]}}}]}),
        r"function.arguments.a\[0\]: half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_call_names_its_field_and_a_remedy(name: str) -> None:
    row, message = BAD[name]
    with pytest.raises(RowError, match=message):
        read(row)
