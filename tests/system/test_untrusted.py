"""Documents that are small and grow without end when they are read are refused; ordinary ones are not."""

from __future__ import annotations

import json

import pytest
import yaml

from qlora_trainer.system.untrusted import DEEPEST, check_yaml, hidden_characters, parse_json, parse_yaml

ENDLESS = 100_000
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * ENDLESS + "]" * ENDLESS, "nested too deeply"),
        ('{"a":' * ENDLESS + "1" + "}" * ENDLESS, "nested too deeply"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than 100 deep"),
        ("9" * ENDLESS, "a number of thousands of digits"),
        ('{"a": -' + "9" * ENDLESS + "}", "a number of thousands of digits"),
        (b"\xff\xfe{", "utf-16"),
        ('{"a": 1', "delimiter"),
    ],
)
def test_json_without_end_is_a_value_error_in_few_words(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200 and "set_int_max" not in str(caught.value)


def test_ordinary_json_is_read_as_json_reads_it() -> None:
    for value in ({"a": [1, 2.5, None, True, "x" * ENDLESS]}, [[{}]] * ENDLESS, 10**300, []):
        assert parse_json(json.dumps(value)) == value
    nested = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(nested) == json.loads(nested)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "values once its aliases are written out"),
        ("lora: &a\n  target_modules: [*a]\n", r"\*a stands inside itself"),
        ("[" * ENDLESS, "nested more than 100 deep"),
        ("{a: " * 1000, "nested more than 100 deep"),
        ("#" * 10_000_000, "longer than 256 KiB"),
        ("seed: " + "9" * ENDLESS, "a number of thousands of digits"),
    ],
)
def test_yaml_without_end_is_a_value_error_in_few_words(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)


def test_ordinary_yaml_keeps_its_aliases_and_its_own_errors() -> None:
    text = "base: &b {r: 8, names: [a, b]}\nlora: *b\nother: &s text\nagain: [*s, *s]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    for broken in ("a: *nowhere", "a: !!python/name:os.system", "a: [", "a: 1\n---\nb: 2"):
        with pytest.raises(yaml.YAMLError):
            check_yaml(broken)
            parse_yaml(broken)


def test_hidden_characters_are_named_and_writing_systems_are_not() -> None:
    assert hidden_characters("a\x1b[31m\nb\x1b\udcff\u202e") == r"\x1b \n \udcff \u202e"
    assert hidden_characters("Übung 语言 🙂 שלום [red] <b> ~ $x 'a b'") == ""
