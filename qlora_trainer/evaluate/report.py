"""What an evaluation says to a person: one table base -> tuned, and examples side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_trainer.evaluate.match import Answer, MatchScore
from qlora_trainer.evaluate.perplexity import LossSum
from qlora_trainer.system.terminal import results


@dataclass(frozen=True)
class Scores:
    """One model on one held-out set; what was not measured is None."""

    loss: LossSum | None = None
    match: MatchScore | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; shares are between 0 and 1, loss in nats per token."""
        found: dict[str, Any] = {}
        if self.loss is not None:
            found |= {"loss": self.loss.loss, "perplexity": self.loss.perplexity, "tokens": self.loss.tokens}
        if self.match is not None:
            found |= {"exact_match": self.match.exact, "questions": len(self.match.answers)}
            if self.match.json_equal is not None:
                found["json_match"] = self.match.json_equal
            sources = self.match.by_source()
            if len(sources) > 1:
                found["exact_match_by_source"] = {name: part.exact for name, part in sources.items()}
        return found


LONGEST_ANSWER = 160  # characters shown

ROWS = {  # key of `as_dict` -> label and number format
    "loss": ("loss (nats per token)", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "tokens": ("tokens measured", "{:,}"),
    "exact_match": ("exact match", "{:.1%}"),
    "json_match": ("same JSON value", "{:.1%}"),
    "questions": ("questions asked", "{:,}"),
}


def comparison(base: Scores, tuned: Scores, examples: int, title: str = "held-out rows") -> RenderableType:
    """The table of every number measured on either side, and below it `examples` answers of each.

    Examples are taken evenly from the questions, never picked by how well they turned out.
    """
    left, right = base.as_dict(), tuned.as_dict()
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("base", "tuned"):
        table.add_column(name, justify="right")
    for key, (label, form) in ROWS.items():
        if key in left or key in right:
            table.add_row(label, *(form.format(side[key]) if key in side else "-" for side in (left, right)))
        if key == "exact_match":
            sides = [side.get("exact_match_by_source", {}) for side in (left, right)]
            for name in sides[1]:
                shares = (f"{side[name]:.1%}" if name in side else "-" for side in sides)
                table.add_row(f"  {Path(name).name}", *shares)
    parts: list[RenderableType] = [table]
    if base.match is not None and tuned.match is not None and examples > 0:
        parts.append(_side_by_side(base.match, tuned.match, examples))
    return Group(*parts)


def examples(base: Scores, tuned: Scores, wanted: int) -> list[dict[str, Any]]:
    """The answers that `comparison` shows, whole, as plain values for JSON."""
    if base.match is None or tuned.match is None or wanted <= 0:
        return []
    return [
        {
            "prompt": before.question.text,
            "reference": before.question.reference,
            "base": before.text,
            "base_right": _right(before),
            "tuned": after.text,
            "tuned_right": _right(after),
        }
        for before, after in _evenly(base.match, tuned.match, wanted)
    ]


def markdown(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """The numbers of `comparison`, of `Scores.as_dict` each, as a Markdown table for the model card."""
    lines = ["| | base | tuned |", "|---|---:|---:|"]
    for key, (label, form) in ROWS.items():
        if key in left or key in right:
            cells = (form.format(side[key]) if key in side else "-" for side in (left, right))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(renderable: RenderableType, console: Console = results) -> None:
    """Prints to the terminal (or wherever `console` writes)."""
    console.print(renderable)


def _side_by_side(base: MatchScore, tuned: MatchScore, examples: int) -> Table:
    table = Table(show_lines=True)
    for name in ("prompt", "reference", "base", "tuned"):
        table.add_column(name, overflow="fold", ratio=1)
    for before, after in _evenly(base, tuned, examples):
        assert before.question == after.question, "base and tuned answered different questions"
        question = before.question
        table.add_row(Text(question.text), Text(question.reference), _marked(before), _marked(after))
    return table


def _evenly(base: MatchScore, tuned: MatchScore, wanted: int) -> Iterator[tuple[Answer, Answer]]:
    pairs = list(zip(base.answers, tuned.answers, strict=True))
    step = max(1, len(pairs) // wanted)
    yield from pairs[::step][:wanted]


def _right(answer: Answer) -> bool:
    return answer.exact or answer.json_equal


def _marked(answer: Answer) -> Text:
    right = _right(answer)
    text = " ".join(answer.text.split())  # a model that rambles must not fill the screen
    shown = text if len(text) <= LONGEST_ANSWER else text[: LONGEST_ANSWER - 1] + "…"
    return Text(f"{'✓' if right else '✗'} {shown}", style="green" if right else "red")
