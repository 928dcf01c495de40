"""Templates: stock families render as their tokenizers do, and exactly what the assistant says is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.encode import Document, Encoder, Masking
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.sandbox import TODAY
from qlora_trainer.data.templates import named_templates, resolve_template
from qlora_trainer.errors import ConfigError, MissingInputError
from tests.data.families import FAMILIES, base, tokenizer

GOLDEN = Path(__file__).parent / "golden"
PLAIN = (
    Message("system", "Be brief."),
    Message("user", "Why is the sky blue? "),
    Message("assistant", " Because air scatters blue light.\n"),
    Message("user", "안녕하세요 🙂"),
    Message("assistant", "안녕하세요. 🙂"),
)
THINKING = (
    Message("user", "What is two plus two?"),
    Message("assistant", "<think>\nadd\n</think>\n\nfour"),
    Message("user", "Thank you"),
    Message("assistant", "<think>\npolite\n</think>\n\nPlease"),
)


def conversations(family: str) -> list[tuple[Message, ...]]:
    return [PLAIN if FAMILIES[family].system else PLAIN[1:], THINKING]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: tuple[Message, ...],
    tools: list[dict] | None = None,
    on_lost: str = "warn",
) -> Document:
    encoder = Encoder(
        tokenizer, template, max_length=4096, overlong="drop", masking=Masking(), on_lost=on_lost
    )
    [documents] = encoder([Example(messages, tools=tools)])
    assert isinstance(documents, list), documents
    return documents[0]


def marked(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    """The document with ⟦supervised⟧ parts in brackets."""
    borders = np.flatnonzero(np.diff(document.weights > 0)) + 1
    parts = np.split(document.ids, borders)
    texts = [tokenizer.decode(part.tolist()) for part in parts]
    return "".join(text if number % 2 == 0 else f"⟦{text}⟧" for number, text in enumerate(texts))


def golden(family: str) -> str:
    tok = tokenizer(family)
    template = resolve_template(None, tok, ["messages"])
    return "\n-----\n".join(
        marked(tok, encode(tok, template, messages)) for messages in conversations(family)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_marks_what_the_golden_file_marks(family: str) -> None:
    assert golden(family) == (GOLDEN / f"{family}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_tokenizers_own_apply_chat_template(family: str) -> None:
    tok = tokenizer(family)
    template = resolve_template(None, tok, ["messages"])
    for messages in conversations(family):
        own = tok.apply_chat_template(
            [message.for_template() for message in messages], return_dict=True, strftime_now=TODAY.strftime
        )["input_ids"]
        assert encode(tok, template, messages).ids.tolist() == own


@pytest.mark.parametrize("family", FAMILIES)
def test_every_assistant_turn_ends_with_a_supervised_end_of_turn_token(family: str) -> None:
    tok = tokenizer(family)
    template = resolve_template(None, tok, ["messages"])
    stop = tok.convert_tokens_to_ids(FAMILIES[family].end_of_turn)
    assert template.end_of_turn == stop
    assert stop in template.stop_token_ids and tok.eos_token_id in template.stop_token_ids
    for messages in conversations(family):
        document = encode(tok, template, messages)
        runs = np.flatnonzero(np.diff(np.append(document.weights > 0, False).astype(int)) == -1)
        assert len(runs) == 2
        assert [int(document.ids[last]) for last in runs] == [stop, stop]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_prompt_has_the_ids_that_inference_gives(family: str) -> None:
    tok = tokenizer(family)
    template = resolve_template(None, tok, ["messages"])
    for messages in conversations(family):
        document = encode(tok, template, messages)
        if not template.layout(Example(messages)).as_prompted:
            assert family == "mistral3" and messages[0].role == "system"
            continue
        prompt = tok.apply_chat_template(
            [message.for_template() for message in messages[:-1]],
            add_generation_prompt=True,
            return_dict=True,
            strftime_now=TODAY.strftime,
        )["input_ids"]
        assert document.ids[: document.answer[0]].tolist() == prompt


@pytest.mark.parametrize("family", ["llama3", "smollm2", "gemma3"])
def test_marks_equal_those_of_a_template_with_generation_tags(family: str) -> None:
    """transformers' own mask of the same template, with its assistant turns put between generation tags."""
    start = {
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "smollm2": "<|im_start|>assistant\n",
        "gemma3": "<start_of_turn>model\n",
    }[family]
    stop = FAMILIES[family].end_of_turn
    trim = "" if family == "smollm2" else " | trim"
    tok = tokenizer(family)
    tagged = (
        "{{ bos }}{% for m in messages %}{% if m.role == 'assistant' %}{{ start }}"
        "{% generation %}{{ m.content" + trim + " + stop }}{% endgeneration %}{{ between }}"
        "{% else %}{{ user + m.content" + trim + " + stop + between }}{% endif %}{% endfor %}"
    )
    words = {
        "bos": tok.bos_token if family != "smollm2" else "",
        "start": start,
        "stop": stop,
        "between": "" if family == "llama3" else "\n",
        "user": start.replace("assistant", "user").replace("model", "user"),
    }
    messages = [message.for_template() for message in (*PLAIN[1:], *THINKING)]
    own = tok.apply_chat_template(
        messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True, **words
    )
    plain = resolve_template(None, tok, ["messages"])
    document = encode(tok, plain, (*PLAIN[1:], *THINKING))
    mine = (document.weights > 0).astype(int).tolist()
    cut = len(own["input_ids"])
    assert document.ids[-cut + 1 :].tolist() == own["input_ids"][1:]  # (SmolLM2 puts a system turn before)
    assert mine[-cut + 1 :] == own["assistant_masks"][1:]
    assert sum(mine) == sum(own["assistant_masks"]) > 20


def test_a_template_with_generation_tags_is_taken_at_its_word_and_its_stop_token_added() -> None:
    tok = tokenizer("smollm2")
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(source, "test", tok)
    text = marked(tok, encode(tok, template, THINKING))
    assert (
        text.count("⟦<think>") == 2
        and text.count("four<|im_end|>⟧") == 1
        and text.count("Please<|im_end|>⟧") == 1
    )


OPENING = (  # its prompt opens, and closes, a thought that a rendering may not have
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def test_a_turn_starts_where_its_prompt_and_its_rendering_part() -> None:
    """A thought, a call without words and an answer, none of which begins as the prompt does."""
    tok = tokenizer("smollm2")
    template = ChatTemplate(OPENING, "test", tok)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = (
        Message("user", "two plus two"),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "4"),
        Message("assistant", "four", extra={"reasoning_content": "It is there."}),
        Message("user", "Sure?"),
        Message("assistant", "Yes."),
    )
    text = marked(tok, encode(tok, template, messages))
    assert text.count("⟦") == 3
    assert '\n⟦<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>⟧\n' in text
    assert "<think>\n⟦It is there.\n</think>\n\nfour<|im_end|>⟧\n" in text
    assert text.endswith("<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n")
    assert not template.layout(Example(messages)).as_prompted


def test_a_call_without_words_is_found_where_a_last_turn_is_rendered_otherwise() -> None:
    """Qwen3 puts an empty thought into a last turn, so the conversation up to the call is no beginning."""
    tok = tokenizer("qwen2")
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '<think>\n\n</think>\n\n' if loop.last and m.role != 'user' }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    said = (("user", "a"), ("assistant", ""), ("tool", "4"), ("user", "c"), ("assistant", "b"))
    messages = tuple(
        Message(role, text, extra=None if text else {"tool_calls": [call]}) for role, text in said
    )
    text = marked(tok, encode(tok, ChatTemplate(source, "test", tok), messages))
    head, called = "<|im_start|>assistant\n", '{"name": "add", "arguments": {"a": 2}}'
    assert text == (
        f"<|im_start|>user\na<|im_end|>\n{head}⟦<tool_call>{called}</tool_call>"
        "<|im_end|>⟧\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        f"{head}⟦<think>\n\n</think>\n\nb<|im_end|>⟧\n"
    )


def test_tool_calls_are_supervised_and_tool_answers_are_not() -> None:
    tok = tokenizer("qwen2")
    template = resolve_template(None, tok, ["messages"])
    call = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
    messages = (
        Message("user", "two plus two"),
        Message("assistant", "", extra=call),
        Message("tool", "4"),
        Message("assistant", "four"),
    )
    text = marked(tok, encode(tok, template, messages))
    assert '⟦<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧' in text
    assert "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧" in text


def test_text_that_looks_like_a_mark_or_a_role_changes_nothing() -> None:
    tok = tokenizer("smollm2")
    template = resolve_template(None, tok, ["messages"])
    messages = (
        Message("user", "say <|im_start|>assistant\nx \ue0000\ue001"),
        Message("assistant", "<|im_start|>assistant\nx \ue0000\ue001"),
    )
    text = marked(tok, encode(tok, template, messages))
    assert text.count("⟦") == 1
    assert text.endswith("⟦<|im_start|>assistant\nx \ue0000\ue001<|im_end|>⟧\n")


def test_system_turn_that_a_template_refuses_is_a_row_error() -> None:
    tok = tokenizer("gemma")
    with pytest.raises(RowError, match="System role not supported"):
        resolve_template(None, tok, ["messages"]).layout(Example(PLAIN))


def test_a_template_that_hides_a_turn_is_refused() -> None:
    tok = tokenizer("smollm2")
    source = (
        "{% for m in messages %}{{ m.role }} {{ loop.length }}: "
        "{{ m.content if loop.length < 3 else m.content[:3] }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(RowError, match="cannot be told"):
        ChatTemplate(source, "test", tok).layout(Example(THINKING))


def test_date_of_a_template_does_not_follow_the_clock() -> None:
    tok = tokenizer("llama31")
    text = resolve_template(None, tok, ["messages"]).render([{"role": "user", "content": "a"}])
    assert "Today Date: 26 Jul 2024" in text


def test_base_model_gets_the_alpaca_prompt_for_alpaca_rows_and_guanaco_for_chats() -> None:
    tok = base()
    instruction = Message("user", "Add.\n\n2 and 2", extra={"instruction": "Add.", "input": "2 and 2"})
    alpaca = resolve_template(None, tok, ["alpaca", "alpaca"])
    document = encode(tok, alpaca, (instruction, Message("assistant", "four")))
    assert marked(tok, document) == (
        "<s> Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n2 and 2\n\n### Response:⟦four</s>⟧"
    )
    guanaco = resolve_template(None, tok, ["alpaca", "sharegpt"])
    assert marked(tok, encode(tok, guanaco, THINKING[2:])) == (
        "<s> ### Human: Thank you\n\n### Assistant:⟦<think>\npolite\n</think>\n\nPlease</s>⟧"
    )
    assert "default" in alpaca.origin and "default" in guanaco.origin


@pytest.mark.parametrize("name", named_templates())
def test_named_templates_end_each_turn_with_a_stop_token(name: str) -> None:
    family = {"chatml": "smollm2", "guanaco": "llama2", "alpaca": "llama2"}.get(name, name)
    tok = tokenizer(family)
    template = resolve_template(name, tok, ["messages"])
    document = encode(tok, template, PLAIN[1:])
    assert marked(tok, document).count("⟦") == 2
    assert int(document.ids[document.weights > 0][-1]) == template.end_of_turn
    assert template.layout(Example(PLAIN[1:])).as_prompted


def test_named_template_without_its_tokens_in_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="has not the token that ends its turns"):
        resolve_template("chatml", base(), ["messages"])


def test_template_file_and_wrong_names(tmp_path: Path) -> None:
    tok = base()
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    text = marked(tok, encode(tok, resolve_template(str(file), tok, ["messages"]), THINKING[2:]))
    assert text.endswith("Please</s>⟧")  # no stop token of its own: EOS is added and supervised
    with pytest.raises(MissingInputError, match="no such file"):
        resolve_template(str(tmp_path / "other.jinja"), tok, ["messages"])
    with pytest.raises(ConfigError, match="unknown name"):
        resolve_template("alpacca", tok, ["messages"])
    file.write_text("{% for m in messages %}{{ m.role }}")
    with pytest.raises(ConfigError, match=r"mine\.jinja, line 1"):
        resolve_template(str(file), tok, ["messages"])


@pytest.mark.parametrize(
    ("addition", "said"),
    [
        ("{{ 1 + m.content }}", r"\(test, line 2\) fails on it: TypeError: unsupported operand"),
        ("{{ m.name.first }}", r"refused by the chat template \(test, line 2\): .* has no attribute 'name'"),
        ("{{ {}['x'] ~ 1 // 0 }}", r"\(test, line 2\) fails on it: ZeroDivisionError"),
        ("{{ m.content|tojson(nonsense=1) }}", r"\(test, line 2\) fails on it: TypeError"),
        ("{{ raise_exception('Two is too many') }}", r"\(test, line 2\): Two is too many"),
    ],
)
def test_whatever_a_template_raises_is_an_error_of_the_row_that_names_its_line(
    addition: str, said: str
) -> None:
    source = (
        "{% for m in messages %}\n{% if m.content == 'Two?' %}"
        + addition
        + "{% endif %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(source, "test", tokenizer("smollm2"))
    template.layout(Example((Message("user", "One?"), Message("assistant", "Yes."))))
    with pytest.raises(RowError, match=said):
        template.layout(Example((Message("user", "Two?"), Message("assistant", "Yes."))))


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'A' * 10 ** 10 }}",
    ],
)
def test_a_template_that_never_ends_is_a_wrong_configuration(source: str) -> None:
    with pytest.raises(ConfigError, match="test, line 1: stopped: it makes more than"):
        ChatTemplate(source, "test", tokenizer("smollm2"))


def test_a_template_nested_beyond_what_python_compiles_is_refused() -> None:
    source = "{% for a in messages %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(ConfigError, match="nested too deeply"):
        ChatTemplate(source, "test", tokenizer("smollm2"))
