"""Does a generated answer equal its reference? Exactly as text, and as JSON where the reference is JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.system.untrusted import parse_json


@dataclass(frozen=True)
class Question:
    """One task item: what the model is given and what it should say.

    Attributes:
        prompt_ids: the prompt as the model sees it, up to where the answer begins.
        reference: the right answer, without stop tokens.
        text: the prompt as a person would like to read it.
        source: the data it came from, where several are measured together.
    """

    prompt_ids: tuple[int, ...]
    reference: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class Answer:
    """A question with what a model said to it."""

    question: Question
    text: str

    @property
    def exact(self) -> bool:
        """Equal as text, but for white space at the ends."""
        return self.text.strip() == self.question.reference.strip()

    @property
    def json_equal(self) -> bool:
        """Both are JSON and hold the same value: key order and spacing are free, `1` is not `"1"`."""
        try:
            return _typed(parse_json(self.text)) == _typed(parse_json(self.question.reference))
        except ValueError:
            return False


@dataclass(frozen=True)
class MatchScore:
    """Shares, from 0 to 1, of right answers."""

    answers: tuple[Answer, ...]

    @property
    def exact(self) -> float:
        return sum(answer.exact for answer in self.answers) / len(self.answers)

    @property
    def json_equal(self) -> float | None:
        """None unless every reference is JSON (an object or a list; a bare number is just text)."""
        if not all(_is_json(answer.question.reference) for answer in self.answers):
            return None
        return sum(answer.json_equal for answer in self.answers) / len(self.answers)

    def by_source(self) -> dict[str, MatchScore]:
        """The score on each source alone, in order of appearance."""
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.question.source, []).append(answer)
        return {source: MatchScore(tuple(answers)) for source, answers in groups.items()}


def match(questions: Sequence[Question], texts: Sequence[str]) -> MatchScore:
    """Scores `texts[i]` as the answer to `questions[i]`; at least one question."""
    assert questions, "nothing to score"
    return MatchScore(tuple(Answer(question, text) for question, text in zip(questions, texts, strict=True)))


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict | list)
    except ValueError:
        return False


def _typed(value: Any) -> Any:
    """`value` with every scalar beside its type's name, for Python holds True, 1 and 1.0 to be equal."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return type(value).__name__, value
