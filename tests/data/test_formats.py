"""Every format people have is read into the same conversations, and bad rows name their field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from qlora_trainer.data.example import Example
from qlora_trainer.data.formats import detect, reader
from qlora_trainer.data.problems import RowError
from qlora_trainer.errors import DataError

TURNS = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")]


def chat(role: str, content: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [{role: names.get(who, who), content: text} for who, text in TURNS]


FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": chat("role", "content", {})}, "messages"),
    "openai parts": (
        {"messages": [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in TURNS]},
        "messages",
    ),
    "sharegpt": ({"conversations": chat("from", "value", {"user": "human", "assistant": "gpt"})}, "sharegpt"),
    "conversations with roles": ({"conversations": chat("role", "content", {})}, "messages"),
    "alpaca with history": (
        {"instruction": "bye", "input": "", "output": "so long", "history": [["hi", "hello"]]},
        "alpaca",
    ),
    "oasst": (
        {
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "replies": [
                    {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "hello",
                        "rank": 0,
                        "replies": [
                            {
                                "role": "prompter",
                                "text": "bye",
                                "replies": [
                                    {"role": "assistant", "text": "deleted", "rank": 0, "deleted": True},
                                    {"role": "assistant", "text": "unranked", "rank": None},
                                    {
                                        "role": "assistant",
                                        "text": "so long",
                                        "rank": 2,
                                        "replies": [{"role": "prompter", "text": "unanswered"}],
                                    },
                                ],
                            }
                        ],
                    },
                ],
            }
        },
        "oasst",
    ),
}


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> Example:
    return reader(detect(row, "f:1"), columns or {})(row)


@pytest.mark.parametrize("name", FORMATS)
def test_conversations_are_the_same_whatever_their_format(name: str) -> None:
    row, expected = FORMATS[name]
    assert detect(row, "f:1") == expected
    assert [(turn.role, turn.content) for turn in read(row).messages] == TURNS


def test_alpaca_keeps_its_input_for_the_template() -> None:
    [question, answer] = read({"instruction": "Add.", "input": "2 2", "output": "4", "system": ""}).messages
    assert question.content == "Add.\n\n2 2"
    assert question.for_template()["input"] == "2 2" and answer.content == "4"


def test_prompt_completion_and_text_stand_as_they_are() -> None:
    assert read({"prompt": "a ", "completion": "b"}) == Example(prompt="a ", completion="b")
    assert read({"input": "a ", "output": "b"}) == Example(prompt="a ", completion="b")
    assert read({"text": "b"}) == Example(completion="b")


def test_prompt_completion_of_messages_teaches_the_completion_only() -> None:
    turns = [{"role": who, "content": text} for who, text in TURNS]
    weights = [turn.weight for turn in read({"prompt": turns[:3], "completion": turns[3:]}).messages]
    assert weights == [0.0, 0.0, 0.0, None]


def test_agents_may_speak_several_times_and_be_interrupted() -> None:
    roles = ["system", "user", "assistant", "assistant", "tool", "tool", "user", "assistant"]
    assert [turn.role for turn in read(turns(*roles)).messages] == roles


def test_lists_may_be_json_text() -> None:
    plain, _ = FORMATS["messages"]
    shared, _ = FORMATS["sharegpt"]
    for row in (
        {"messages": json.dumps(plain["messages"])},
        {"conversations": json.dumps(shared["conversations"])},
        {"conversations": json.dumps(plain["messages"])},
        {"instruction": "bye", "output": "so long", "history": '[["hi", "hello"]]'},
    ):
        assert [(turn.role, turn.content) for turn in read(row).messages] == TURNS


def test_nan_is_pandas_word_for_nothing() -> None:
    row = {"instruction": "hi", "input": math.nan, "output": "hello", "system": math.nan, "score": math.nan}
    assert read(row) == read({"instruction": "hi", "output": "hello"})
    with pytest.raises(RowError, match="output: expected text, found null"):
        read({"instruction": "hi", "output": math.nan})


def test_other_keys_of_a_turn_go_to_the_template_under_their_own_names() -> None:
    kept = {"name": "ann", "mood": {"calm": False}, "rank": 0}
    answer = {
        "role": "assistant",
        "content": "b",
        "weight": 1,
        "thinking": "hm",
        "reasoning": None,
        "labels": [],
    }
    first, second = read({"messages": [{"role": "user", "content": "a", **kept}, answer]}).messages
    assert first.for_template() == {"role": "user", "content": "a", **kept}
    assert second.for_template() == {"role": "assistant", "content": "b", "thinking": "hm"}


def test_an_answer_may_be_a_thought_or_a_call_but_not_its_metadata() -> None:
    def answer(**keys: Any) -> Example:
        return read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **keys}]})

    call = {"function": {"name": "f", "arguments": {}}}
    for spoken in ({"thinking": "hm"}, {"tool_calls": [call]}, {"content": None, "reasoning": "hm"}):
        example = answer(**spoken)
        assert example.messages[1].content == "" and not example.empty
    assert answer(content=" ", id="x7", name="bot").empty
    with pytest.raises(RowError, match=r"messages\[1\].content: missing column"):
        answer(name="bot")


def test_columns_can_be_mapped() -> None:
    row = {"Q": "hi", "A": "hello", "label": 0}
    with pytest.raises(DataError, match=r"Q, A, label.*data\.columns"):
        detect(row, "f:1")
    example = reader("alpaca", {"instruction": "Q", "output": "A"})(row)
    assert [turn.content for turn in example.messages] == ["hi", "hello"]
    with pytest.raises(RowError, match="A: missing column; the row has Q"):
        reader("alpaca", {"instruction": "Q", "output": "A"})({"Q": "hi"})


def test_weights_and_train_flags() -> None:
    turns = [{"role": who, "content": text} for who, text in TURNS]
    turns[1] |= {"train": False}
    turns[2] |= {"weight": 0.5}
    turns[3] |= {"loss_weight": 2}
    assert [turn.weight for turn in read({"messages": turns}).messages] == [None, 0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"conversations": chat("from", "value", {}), "chosen": {}, "rejected": {}},
        {"messages": chat("role", "content", {}), "label": True},
    ],
)
def test_preference_data_is_refused_with_a_clear_word(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="preference data"):
        detect(row, "f:1")


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "int as text": ({"instruction": "a", "output": 5}, "output: expected text, found a number"),
    "null as text": ({"instruction": None, "output": "a"}, "instruction: expected text, found null"),
    "no output": ({"messages": [{"role": "user"}]}, r"messages\[0\].content: missing column"),
    "nothing asked": ({"instruction": " ", "input": "", "output": "a"}, "instruction: empty"),
    "nul": ({"instruction": "a\0", "output": "a"}, "instruction: NUL character at 1"),
    "surrogate": ({"instruction": "a", "output": "\ud83d"}, "output: half of a surrogate pair"),
    "unknown role": (turns("user", "robot"), r"messages\[1\].role: unknown role 'robot'"),
    "role as number": ({"messages": [{"role": 1, "content": "a"}]}, r"messages\[0\].role: expected text"),
    "empty": ({"messages": []}, "messages: empty conversation"),
    "twice user": (turns("user", "user"), r"messages\[1\]: user turn after user; .*join the two"),
    "tool first": (turns("user", "tool"), "tool turn after user; expected assistant"),
    "assistant first": (turns("assistant", "user"), "assistant turn first; expected system or user"),
    "late system": (turns("user", "assistant", "system"), "system turn after assistant"),
    "user last": (turns("user", "assistant", "user"), "ends with a user turn"),
    "system only": (turns("system"), "ends with a system turn"),
    "not a list": ({"conversations": "a", "messages": [1]}, r"messages\[0\]: expected an object"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "only text can be trained on, found 'image_url'",
    ),
    "weight": (
        {"messages": [{"role": "user", "content": "a", "weight": -1}]},
        "weight: expected a number of 0 or more",
    ),
    "train": (
        {"messages": [{"role": "user", "content": "a", "train": "no"}]},
        "train: expected true or false",
    ),
    "history": (
        {"instruction": "a", "output": "b", "history": [["x"]]},
        r"history\[0\]: expected \[question, answer\]",
    ),
    "repr of turns": (
        {"messages": "[{'role': 'user'}]"},
        "messages: .*Python's repr; write it with json.dumps",
    ),
    "surrogate in an extra": (
        {"messages": [{"role": "user", "content": "a", "name": "\ud83d"}]},
        r"messages\[0\].name: half of a surrogate pair",
    ),
    "tree role": ({"prompt": {"role": "x", "text": "a", "replies": []}}, "prompt.role: unknown role 'x'"),
    "tree alone": (
        {"prompt": {"role": "prompter", "text": "a", "replies": []}},
        "prompt: empty conversation",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_their_field(name: str) -> None:
    row, message = BAD[name]
    with pytest.raises(RowError, match=message):
        read(row)
