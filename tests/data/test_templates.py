"""Which template applies, and how those of the package render tools."""

from __future__ import annotations

import copy

import pytest

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.encode import Encoder, Masking
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.templates import named_templates
from tests.data.families import tokenizer
from tests.data.test_chat import marked
from tests.data.test_lost import TOOLS, called, thinking


def shown(name: str, family: str, example: Example, specials: tuple[str, ...] = ()) -> str:
    tok = tokenizer(family)
    if specials:
        tok = copy.deepcopy(tok)
        tok.add_special_tokens({"additional_special_tokens": list(specials)})
    template = ChatTemplate(named_templates()[name], name, tok)
    assert template.layout(example).as_prompted
    encode = Encoder(tok, template, max_length=4096, overlong="drop", masking=Masking())
    [result] = encode([example])
    if isinstance(result, RowError):
        raise result
    assert isinstance(result, list)
    return marked(tok, result[0])


def test_chatml_renders_tools_as_hermes_and_qwen_do() -> None:
    messages = (Message("system", "Be brief."), *called({"town": "Ulm"}, said="Let me look."))
    text = shown("chatml", "smollm2", Example(messages, tools=TOOLS))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "weather", ' in text
    assert (
        "<|im_start|>assistant\n⟦Let me look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"town": "Ulm"}}\n'
        "</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n"
        '{"rain": true}\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n'
    ) in text


def test_chatml_renders_several_calls_and_thoughts() -> None:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"a": 1}}} for name in ("one", "two")
    ]
    messages = (
        Message("user", "Go"),
        Message("assistant", "", extra={"tool_calls": calls, "thinking": "Both."}),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "3"),
    )
    text = shown("chatml", "smollm2", Example(messages))
    assert (
        '⟦<think>\nBoth.\n</think>\n\n<tool_call>\n{"name": "one", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "two", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n'
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    ) in text
    earlier = shown("chatml", "smollm2", Example(thinking("reasoning", "Hm 1.", "Hm 2.")))
    assert "⟦<think>\nHm 1.\n</think>\n\nA0.<|im_end|>⟧" in earlier and "Hm 2." in earlier


def test_llama3_renders_tools_as_llama_31_does() -> None:
    text = shown("llama3", "llama3", Example(called({"town": "Ulm"}), tools=TOOLS))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text.startswith(
        f"<|begin_of_text|>{head.format('system')}Environment: ipython\n\n<|eot_id|>{head.format('user')}"
        "Given the following functions, please respond with a JSON for a function call"
    )
    assert '{\n    "type": "function",\n' in text and "\n\nRain?<|eot_id|>" in text
    assert (
        head.format("assistant") + '⟦{"name": "weather", "parameters": {"town": "Ulm"}}<|eot_id|>⟧'
        f'{head.format("ipython")}{{"rain": true}}<|eot_id|>{head.format("assistant")}⟦Yes.<|eot_id|>⟧'
    ) in text
    two = called({"a": 1})[1].extra["tool_calls"] * 2
    with pytest.raises(RowError, match="one call a turn"):
        shown(
            "llama3",
            "llama3",
            Example((Message("user", "a"), Message("assistant", "", extra={"tool_calls": two}))),
        )
    with pytest.raises(RowError, match=r"does not render 'Let me look\.'"):
        shown("llama3", "llama3", Example(called({"town": "Ulm"}, said="Let me look.")))


def test_mistral_renders_tools_as_version_3_does() -> None:
    specials = (
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    )
    text = shown("mistral", "mistral", Example(called({"town": "Ulm"}), tools=TOOLS), specials).replace(
        " ", ""
    )
    assert (
        text.startswith('<s>[AVAILABLE_TOOLS][{"type":"function",') and "}][/AVAILABLE_TOOLS][INST]" in text
    )
    assert (
        '[/INST]⟦[TOOL_CALLS][{"name":"weather","arguments":{"town":"Ulm"},"id":"call00001"}]</s>⟧'
        '[TOOL_RESULTS]{"content":{"rain":true},"call_id":"call00001"}[/TOOL_RESULTS]⟦Yes.</s>⟧'
    ) in text


@pytest.mark.parametrize("name", ["alpaca", "guanaco", "llama2", "gemma"])
def test_a_family_without_tools_refuses_them(name: str) -> None:
    family = {"gemma": "gemma"}.get(name, "llama2")
    with pytest.raises(RowError):
        shown(name, family, Example(called({"town": "Ulm"})))
    with pytest.raises(RowError, match=r"tools\[0\].function.name"):
        shown(name, family, Example((Message("user", "a"), Message("assistant", "b")), tools=TOOLS))
