"""Masks, borders and the policy for rows that are too long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_trainer.data.chat import ChatTemplate
from qlora_trainer.data.encode import Dropped, Encoder, Masking
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import RowError
from qlora_trainer.data.templates import resolve_template
from tests.data.families import FAMILIES, base, tokenizer
from tests.data.test_chat import PLAIN, THINKING, marked


def encoder(
    family: str = "smollm2",
    max_length: int = 4096,
    overlong: str = "drop",
    on_lost: str = "error",
    **masking: bool,
) -> Encoder:
    tok = tokenizer(family)
    template = resolve_template(None, tok, ["messages"])
    return Encoder(
        tok,
        template,
        max_length=max_length,
        overlong=overlong,
        masking=Masking(**masking),
        on_lost=on_lost,
    )


def show(encode: Encoder, example: Example) -> str:
    [documents] = encode([example])
    assert isinstance(documents, list) and len(documents) == 1, documents
    return marked(encode.tokenizer, documents[0])


def test_train_on_inputs_supervises_all_but_the_first_token() -> None:
    encode = encoder(train_on_inputs=True)
    [[document]] = encode([Example(PLAIN)])
    assert document.weights[0] == 0 and (document.weights[1:] == 1).all()


def test_last_turn_only() -> None:
    text = show(encoder(last_turn_only=True), Example(THINKING))
    assert text.count("⟦") == 1 and "⟦<think>\npolite\n</think>\n\nPlease<|im_end|>⟧" in text


def test_message_weights_scale_their_turn_with_its_end() -> None:
    turns = (
        Message("user", "one", weight=0.5),
        Message("assistant", "two", weight=0.0),
        Message("user", "three"),
        Message("assistant", "four", weight=0.25),
    )
    encode = encoder()
    [[document]] = encode([Example(turns)])
    weighted = {
        weight: encode.tokenizer.decode(document.ids[document.weights == np.float32(weight)].tolist())
        for weight in (0.5, 0.25)
    }
    assert weighted == {0.5: "one", 0.25: "four<|im_end|>"}
    assert set(document.weights.tolist()) == {0.0, 0.25, 0.5}


def test_a_message_can_be_left_out_of_train_on_inputs() -> None:
    turns = (Message("user", "one two", weight=0.0), Message("assistant", "three"))
    text = show(encoder(train_on_inputs=True), Example(turns))
    assert "user\n⟧one two⟦<|im_end|>" in text


def test_raw_prompt_and_completion_get_bos_and_a_supervised_eos() -> None:
    tok = base()
    encode = Encoder(tok, None, max_length=64, overlong="drop", masking=Masking())
    assert (
        show(encode, Example(prompt="two plus two is", completion=" four")) == "<s> two plus two is⟦four</s>⟧"
    )
    assert show(encode, Example(completion="the sky")) == "<s>⟦the sky</s>⟧"
    [[document]] = encode([Example(prompt="two", completion=" four</s>")])
    assert (document.ids == tok.eos_token_id).sum() == 1, "an EOS that is written out is not doubled"
    assert not encode.notes
    encode([Example(prompt="two", completion=" four<s>")])
    assert encode.notes == {"other_end": {0: ""}}
    [[document]] = encode([Example(prompt="<s>two", completion=" four")])
    assert (document.ids == tok.bos_token_id).sum() == 1, "a BOS that is written out is not doubled"


def test_double_and_missing_bos_are_counted() -> None:
    tok = tokenizer("llama2")
    encode = encoder("llama2")
    encode([Example((Message("user", "a"), Message("assistant", "b")))])
    assert not encode.notes
    own = tok.chat_template
    for source, note in (
        ("{{ bos_token }}" + own, "double_bos"),
        (own.replace("bos_token + ", ""), "missing_bos"),
    ):
        template = ChatTemplate(source, "test", tok)
        encode = Encoder(tok, template, max_length=64, overlong="drop", masking=Masking())
        encode([Example((Message("user", "a"), Message("assistant", "b")))])
        assert encode.notes == {note: {0: ""}}


def test_a_prompt_that_inference_would_not_see_is_counted() -> None:
    encode = encoder("mistral3", on_lost="warn")
    encode([Example(PLAIN), Example(PLAIN[1:])])
    assert encode.notes == {"prompt_differs": {0: ""}, "lost_content": {0: "messages[0].content"}}


LONG = Example(
    (Message("user", "one two three"), Message("assistant", "four five six seven eight nine ten " * 4))
)


@pytest.mark.parametrize("family", ["llama2", "smollm2"])
def test_overlong_policies(family: str) -> None:
    [[whole]] = encoder(family)([LONG])
    size = 40
    assert len(whole.ids) > 2 * size
    [dropped] = encoder(family, size, "drop")([LONG])
    assert isinstance(dropped, Dropped) and dropped.reason == "too_long"
    [refused] = encoder(family, size, "error")([LONG])
    assert isinstance(refused, RowError) and f"{len(whole.ids)} tokens" in str(refused)
    if whole.weights[:size].any():
        [[right]] = encoder(family, size, "truncate_right")([LONG])
        assert right.ids.tolist() == whole.ids[:size].tolist() and right.answer == (-1, -1)
    [[left]] = encoder(family, size, "truncate_left")([LONG])
    keep = int(whole.ids[0] == tokenizer(family).bos_token_id)
    assert left.ids.tolist() == whole.ids[:keep].tolist() + whole.ids[len(whole.ids) - size + keep :].tolist()
    assert len(left.ids) == size and left.weights[0] == 0
    [pieces] = encoder(family, size, "split")([LONG])
    cut = [whole.ids[start : start + size].tolist() for start in range(0, len(whole.ids), size)]
    kept = [piece.ids.tolist() for piece in pieces]
    assert kept == cut[-len(kept) :] and len(kept) >= 2
    assert all(piece.weights[0] == 0 for piece in pieces)


def test_rows_that_teach_nothing_are_dropped_with_the_reason() -> None:
    encode = encoder(max_length=24, overlong="truncate_right")
    long_prompt = Example((Message("user", "why " * 50), Message("assistant", "because")))
    empty = Example((Message("user", "why"), Message("assistant", " ")))
    muted = Example((Message("user", "why"), Message("assistant", "because", weight=0.0)))
    results = encode([long_prompt, empty, muted])
    assert [result.reason for result in results if isinstance(result, Dropped)] == [
        "all_masked",
        "empty_answer",
        "all_masked",
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral3"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    contents=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0az"), min_size=1), min_size=2, max_size=6
    )
)
def test_supervised_text_is_what_the_assistant_said(family: str, contents: list[str]) -> None:
    """Any text: each answer, trimmed or not, is in the supervised tokens, and no question is."""
    contents = contents[: len(contents) // 2 * 2]
    turns = tuple(
        Message("assistant" if at % 2 else "user", f"{at}a{text}z{at}") for at, text in enumerate(contents)
    )
    encode = encoder(family)
    [[document]] = encode([Example(turns)])
    borders = np.flatnonzero(np.diff(document.weights > 0)) + 1
    parts = np.split(document.ids, borders)
    said = [encode.tokenizer.decode(part.tolist()) for part in parts[1::2]]
    rest = "".join(encode.tokenizer.decode(part.tolist()) for part in parts[::2])
    assert len(said) == len(turns) // 2
    for number, text in enumerate(said):
        at = 2 * number + 1
        assert f"{at}a" in text
        assert text.endswith(FAMILIES[family].end_of_turn)
        assert text.removesuffix(FAMILIES[family].end_of_turn).rstrip().endswith(f"z{at}")
        assert f"{at}a" not in rest and f"{at - 1}a" in rest
