"""The demo's data: the same everywhere, strict, and with nothing of the held-out splits in train."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer.data import restaurant

SPLITS = ("train", "eval_names", "eval_phrasings")
KEYS = ["intent", "name", "people", "date", "time"]


def turns(split: str) -> list[tuple[str, str]]:
    """(what the user says, what the assistant answers) of every row."""
    rows = [row["messages"] for row in restaurant.rows(split)]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


def digest() -> str:
    return hashlib.sha256(json.dumps([turns(split) for split in SPLITS]).encode()).hexdigest()


def test_rows_are_the_same_in_every_process() -> None:
    program = "from tests.data.test_restaurant import digest; print(digest())"
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(restaurant.__file__).parents[2])},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest()


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_compact_strict_json_with_every_key_in_order(split: str) -> None:
    for message, answer in turns(split):
        fields = json.loads(answer)
        assert list(fields) == KEYS
        assert answer == json.dumps(fields, separators=(",", ":"))
        assert fields["intent"] in restaurant.PHRASINGS
        assert fields["name"] in message
        assert fields["people"] is None or 2 <= fields["people"] <= 9
        assert fields["date"] in {None, "today", "tomorrow", *restaurant.DAYS}
        assert fields["time"] is None or re.fullmatch(r"[5-9]:[03]0 pm", fields["time"])


@pytest.mark.parametrize("split", SPLITS)
def test_answers_say_exactly_what_the_message_says(split: str) -> None:
    """Read back by rules of the test's own, not by the generator's templates."""
    numbers = "zero|one|two|three|four|five|six|seven|eight|nine"
    words = numbers.split("|")
    clock = re.compile(rf"(\d):([03]0)(?: pm)?|(\d) pm|({numbers}) o'clock|half past ({numbers})")
    for message, answer in turns(split):
        fields = json.loads(answer)
        found = clock.search(message)
        assert (found is None) == (fields["time"] is None), message
        if found:
            hour, minutes, full_hour, word, half_word = found.groups()
            if half_word:
                time = f"{words.index(half_word)}:30 pm"
            elif word:
                time = f"{words.index(word)}:00 pm"
            else:
                time = f"{hour or full_hour}:{minutes or '00'} pm"
            assert time == fields["time"], message
        rest = clock.sub("", message)
        people = re.search(rf"\b(?:([2-9])|({numbers}))\b", rest)
        expected = None if people is None else int(people[1] or words.index(people[2]))
        assert expected == fields["people"], message
        date = re.search(r"tonight|tomorrow|\w+day\b", rest)
        said = None if date is None else {"tonight": "today"}.get(date[0], date[0])
        assert said == fields["date"], message


def test_held_out_people_and_phrasings_do_not_occur_in_train() -> None:
    train = turns("train")
    known = {word for _, answer in train for word in json.loads(answer)["name"].split()}
    for split in ("eval_names", "eval_phrasings"):
        for _, answer in turns(split):
            assert known.isdisjoint(json.loads(answer)["name"].split())
    old = [line for lines in restaurant.PHRASINGS.values() for line in lines.splitlines()]
    new = [line for lines in restaurant.NEW_PHRASINGS.values() for line in lines.splitlines()]
    assert not set(old) & set(new)


def test_train_has_every_phrasing_and_no_message_twice() -> None:
    messages = [message for message, _ in turns("train")]
    assert len(set(messages)) == len(messages) == restaurant.TRAIN_ROWS
    for lines in restaurant.PHRASINGS.values():
        for line in lines.splitlines():
            longest = max(re.split(r"\{\w+\}", line), key=len)[1:]
            assert any(longest in message for message in messages), line


@pytest.mark.parametrize("split", ("eval_names", "eval_phrasings"))
def test_intents_are_balanced(split: str) -> None:
    intents = [json.loads(answer)["intent"] for _, answer in turns(split)]
    assert len(intents) == restaurant.EVAL_ROWS
    counts = [intents.count(intent) for intent in restaurant.PHRASINGS]
    assert max(counts) - min(counts) <= 1
