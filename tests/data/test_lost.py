"""What a template leaves out is found, named, and neither taught nor passed over."""

from __future__ import annotations

import pytest

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.encode import Document, Encoder, Masking
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.lost import held
from qlora_trainer.data.problems import RowError
from tests.data.families import tokenizer
from tests.data.test_chat import marked

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "description": "Its name"},
                    "unit": {"type": "string", "enum": ["kelvin", "celsius"]},
                },
                "required": ["town"],
            },
        },
    }
]


def called(arguments: dict, name: str = "weather", said: str = "") -> tuple[Message, ...]:
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}
    return (
        Message("user", "Rain?"),
        Message("assistant", said, extra={"tool_calls": [call]}),
        Message("tool", '{"rain": true}', extra={"tool_call_id": "call00001"}),
        Message("assistant", "Yes."),
    )


def thinking(key: str, *thoughts: str | None) -> tuple[Message, ...]:
    turns: list[Message] = []
    for number, thought in enumerate(thoughts):
        extra = {key: thought} if thought else None
        turns += [Message("user", f"Q{number}?"), Message("assistant", f"A{number}.", extra=extra)]
    return tuple(turns)


def encoder(source: str | None, on_lost: str = "error", family: str = "smollm2") -> Encoder:
    tok = tokenizer(family)
    template = ChatTemplate(source or tok.chat_template, "mine", tok)
    return Encoder(tok, template, max_length=4096, overlong="drop", masking=Masking(), on_lost=on_lost)


def outcome(encode: Encoder, messages: tuple[Message, ...], tools: list | None = None) -> str | RowError:
    [result] = encode([Example(messages, tools=tools)])
    if isinstance(result, list):
        [document] = result
        assert isinstance(document, Document)
        return marked(encode.tokenizer, document)
    assert isinstance(result, RowError)
    return result


# Templates that render a conversation and leave one thing out.
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}" + TAIL
NAMES = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}" + TAIL
CALLS = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function|tojson }}{% endfor %}" + TAIL


@pytest.mark.parametrize(
    ("source", "messages", "tools", "field", "what"),
    [
        (PLAIN, called({"town": "Ulm"}), None, "messages[1].tool_calls[0].function.name", "'weather'"),
        (NAMES, called({"town": "Ulm"}), None, "messages[1].tool_calls[0].function.arguments.town", "'town'"),
        (
            HEAD + "{% for c in m.tool_calls or [] %}{{ c.function|tojson }}{% endfor %}"
            "{{ m.content if not m.tool_calls }}" + TAIL,
            called({"town": "Ulm"}, said="Let me look."),
            None,
            "messages[1].content",
            "'Let me look.'",
        ),
        (
            HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{{ c.function.arguments|list }}{% endfor %}" + TAIL,
            called({"days": 273}),
            None,
            "messages[1].tool_calls[0].function.arguments.days",
            "273",
        ),
        (CALLS, called({"town": "Ulm"}), TOOLS, "tools[0].function.description", "'Weather of a town'"),
        (
            "{{ tools[0].function.description if tools }}" + CALLS,
            called({"town": "Ulm"}),
            TOOLS,
            "tools[0].function.parameters.properties.town.description",
            "'Its name'",
        ),
        (
            HEAD + "{{ m.content if m.role != 'tool' }}"
            "{% for c in m.tool_calls or [] %}{{ c.function|tojson }}{% endfor %}" + TAIL,
            called({"town": "Ulm"}),
            None,
            "messages[2].content",
            "'{\"rain\": true}'",
        ),
        (PLAIN, thinking("reasoning_content", "Hm."), None, "messages[1].reasoning_content", "'Hm.'"),
        (PLAIN, thinking("thinking", "Hm.", None), None, "messages[1].thinking", "'Hm.'"),
        (
            PLAIN,
            (Message("user", "Q", extra={"name": "Bob"}), Message("assistant", "A")),
            None,
            "messages[0].name",
            "'Bob'",
        ),
        (
            PLAIN,
            (Message("user", "Q"), Message("assistant", "A", extra={"sources": [{"title": "A book"}]})),
            None,
            "messages[1].sources[0].title",
            "'A book'",
        ),
    ],
)
def test_what_is_lost_is_an_error_that_names_field_and_template(
    source: str, messages: tuple[Message, ...], tools: list | None, field: str, what: str
) -> None:
    found = outcome(encoder(source), messages, tools)
    assert isinstance(found, RowError)
    assert found.problem.field == field
    assert f"the chat template (mine) does not render {what}: " in found.problem.text
    assert "data.on_lost_content=warn" in found.problem.text
    going_on = encoder(source, on_lost="warn")
    assert isinstance(outcome(going_on, messages, tools), str)
    assert going_on.notes["lost_content"] == {0: field}


def test_a_turn_whose_call_is_lost_is_not_only_said_to_be_hidden() -> None:
    """Without end tokens nothing tells where the empty turn ends, but what is missing can be told."""
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = outcome(encoder(source), called({"town": "Ulm"}))
    assert isinstance(found, RowError) and found.problem.field == "messages[1].tool_calls[0].function.name"


def test_a_value_elsewhere_in_the_conversation_does_not_stand_for_the_call() -> None:
    """The user, the tool and the answer all say what the call says; the call's own turn is empty."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
    messages = (
        Message("user", "weather in town Ulm"),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "weather town Ulm"),
        Message("assistant", "weather town Ulm"),
    )
    found = outcome(encoder(PLAIN), messages)
    assert isinstance(found, RowError) and found.problem.field == "messages[1].tool_calls[0].function.name"


@pytest.mark.parametrize(
    "messages",
    [
        called({"town": "Ulm", "note": 'say "hi"\nand é 🙂 <b>', "n": 2, "x": 1.5, "yes": True, "no": None}),
        called({"where": {"towns": ["Ulm", "Köln"], "deep": {"a": []}}}),
        called({}, said="Let me look."),
    ],
)
def test_a_template_that_renders_calls_is_content(messages: tuple[Message, ...]) -> None:
    for flag in ("", "ensure_ascii=true", "indent=2"):
        source = CALLS.replace("tojson", f"tojson({flag})")
        assert isinstance(outcome(encoder(source), messages), str), flag


def test_ids_numbers_and_nulls_of_other_keys_are_not_content() -> None:
    extra = {"id": "x1", "parent_id": "x0", "rank": 3, "flagged": True, "type": "chat"}
    messages = (Message("user", "Q", extra=extra), Message("assistant", "A", extra={"created": 17.5}))
    encode = encoder(PLAIN)
    assert isinstance(outcome(encode, messages), str) and not encode.notes


def test_texts_that_templates_write_in_their_own_way_are_held() -> None:
    assert held("  two\n  lines ", "x two\n    lines y") and held('"q"\n', 'say \\"q\\"')
    assert held("é", "\\u00e9") and held("Do this.\n\nWith that.", "## Do this.\n## Input\nWith that.")
    assert not held("two words", "two other words") and held("", "")


QWEN3_LIKE = (  # strips the thoughts of all turns but those behind the last question
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{%- set c = m.content %}"
    "{%- set r = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{%- if not r and '</think>' in c %}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{ '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}{{ c }}"
    "{%- else %}{{ m.content }}{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_reach_the_template_under_the_name_it_reads(key: str) -> None:
    text = outcome(encoder(QWEN3_LIKE), thinking(key, "Hm."))
    said = "<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nA0.<|im_end|>⟧\n"
    assert text == "<|im_start|>user\nQ0?<|im_end|>\n" + said
    other = QWEN3_LIKE.replace("reasoning_content", "thinking")
    assert outcome(encoder(other), thinking(key, "Hm.")) == text


def test_thoughts_of_earlier_turns_that_a_template_leaves_out_are_a_note() -> None:
    inside = tuple(
        Message(m.role, f"<think>\nHm {at}.\n</think>\n\n{m.content}" if m.role == "assistant" else m.content)
        for at, m in enumerate(thinking("thinking", None, None))
    )
    for messages in (thinking("reasoning_content", "Hm 1.", "Hm 3."), inside):
        encode = encoder(QWEN3_LIKE)
        text = outcome(encode, messages)
        assert isinstance(text, str) and "Hm 1." not in text and "⟦<think>\nHm 3.\n</think>" in text
        assert encode.notes["thoughts_left_out"] == {0: ""} and "lost_content" not in encode.notes


def test_a_last_thought_that_is_stripped_is_lost() -> None:
    strips = HEAD + "{{ m.content.split('</think>')[-1] }}" + TAIL
    messages = (Message("user", "Q"), Message("assistant", "<think>\nHm.\n</think>\n\nA"))
    found = outcome(encoder(strips), messages)
    assert isinstance(found, RowError) and found.problem.field == "messages[1].content"
    assert "Hm." in found.problem.text


def test_arguments_take_the_form_that_a_template_reads() -> None:
    """`|tojson` wants an object, `+ arguments` and `{{ arguments }}` want JSON text: none teaches Python."""
    expected = '{"name": "weather", "arguments": {"town": "Ulm", "n": 2}}'
    for printed in (
        "c.function.arguments|tojson",
        "'' + c.function.arguments",
        "c.function.arguments",
        "c.function.arguments if c.function.arguments is string else c.function.arguments|tojson",
    ):
        source = (
            HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}"
            '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' }}{{ '
            + printed
            + " }}{{ '}' }}{% endfor %}"
            + TAIL
        )
        text = outcome(encoder(source), called({"town": "Ulm", "n": 2}))
        assert isinstance(text, str) and f"⟦{expected}<|im_end|>⟧" in text, printed


def test_arguments_in_pythons_words_are_lost() -> None:
    source = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ [c.function] }}{% endfor %}" + TAIL
    found = outcome(encoder(source), called({"town": "Ulm"}))
    assert isinstance(found, RowError) and "as JSON (it is there as Python writes it)" in found.problem.text


def test_a_thought_may_say_in_pythons_words_what_the_call_says_in_json() -> None:
    asked, _, *rest = called({"town": "Ulm"})
    call = called({"town": "Ulm"}, said="So {'town': 'Ulm'} it is.")[1]
    source = (
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function|tojson }}{% endfor %}" + TAIL
    )
    found = outcome(encoder(source), (asked, call, *rest))
    assert isinstance(found, str) and 'it is.{"name": "weather", "arguments": {"town": "Ulm"}}' in found


def test_a_system_text_that_mistral_drops_is_lost() -> None:
    turns = [Message("system", "Be brief."), *thinking("", None, None)]
    found = outcome(encoder(None, family="mistral3"), tuple(turns))
    assert isinstance(found, RowError) and found.problem.field == "messages[0].content"
