"""A Survey on the terminal: a coloured example, the numbers, and what to worry about.

Comes in: surveys by role. Goes out: text on a rich console.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_trainer.data import overlap
from qlora_trainer.data.store import Ledger
from qlora_trainer.data.survey import BatchDocument, Survey

BAR = 32  # characters of the longest histogram bar
EXAMPLE_TOKENS = 600
REASONS = {
    "bad_row": "rows that could not be read (data.on_bad_row=skip)",
    "duplicate_id": "the id of an earlier row",
    "empty_answer": "no answer text",
    "too_long": "over train.max_length (data.overlong=drop)",
    "all_masked": "nothing left to learn within train.max_length",
}
NOTES = {
    "truncated": "cut to train.max_length",
    "split": "cut into pieces of train.max_length",
    "double_bos": "begin with two BOS tokens: take one out of the template or the text",
    "missing_bos": "begin without the BOS that this tokenizer puts before plain text",
    "eos_added": "got an EOS after the last answer, because the template prints no end of turn",
    "other_end": "end with an added token of their own, before the EOS that stops generation",
    "prompt_differs": "have a prompt that the template renders otherwise at inference",
    "control_text": "have the text of control tokens in what people say: here it is plain text, and a server "
    "may read it otherwise",
    "lost_content": "say something that the template does not render (data.on_lost_content=warn)",
    "thoughts_left_out": "have thoughts in earlier turns, which the template leaves out: they teach nothing",
    "open_turn": "have a turn that the template does not end with its end-of-turn token",
}
WORRYING = (
    "double_bos",
    "missing_bos",
    "other_end",
    "prompt_differs",
    "control_text",
    "lost_content",
    "thoughts_left_out",
    "open_turn",
)


def show(surveys: dict[str, Survey], console: Console) -> None:
    """Print every survey (`train`, and `eval` if something is held out)."""
    train = surveys["train"]
    if train.batch:
        console.print(_example(train.batch[0].documents[0]))
    table = Table(box=None, pad_edge=False, show_header=len(surveys) > 1)
    table.add_column("")
    for role in surveys:
        table.add_column({"train": "training", "eval": "held out"}[role])
    columns = [facts(survey) for survey in surveys.values()]
    for name in columns[0]:
        table.add_row(Text(name, "bold"), *(column.get(name, "") for column in columns))
    console.print(table)
    console.print(_histogram(train))
    for role, survey in surveys.items():
        for line in warnings(survey):
            console.print(Text(f"! {'held out: ' * (role == 'eval')}{line}", "yellow"))


def facts(survey: Survey) -> dict[str, str]:
    """What there is to know, as label -> words; the page shows the same."""
    ledger = survey.ledger
    dropped = sum(ledger.dropped.values())
    found = {
        "source": "\n".join(
            f"{name} ({kind})" for name, kind in zip(survey.sources, survey.formats, strict=True)
        ),
        "template": f"{survey.template}, stops at {' '.join(survey.stops)}",
        "rows": f"{ledger.read:,} read, {ledger.kept:,} kept, {dropped:,} dropped",
    }
    for reason, count in ledger.dropped.items():
        found[f"  {reason}"] = f"{count:,}: {REASONS[reason]}"
    for note, count in ledger.notes.items():
        found[f"  {note}"] = f"{count:,} {NOTES[note]}"
    per_document = survey.supervised / survey.documents
    found |= {
        "tokens": f"{survey.tokens:,} in {survey.documents:,} documents",
        "lengths": ", ".join(f"{name} {value:,}" for name, value in survey.lengths.items()),
        "supervised": f"{survey.supervised / survey.tokens:.1%} of tokens, {per_document:,.1f} a document",
        "batches": f"{survey.layout}: {survey.rows:,} rows, {survey.steps:,} steps an epoch",
        "padding": f"{survey.padding:.2%} of positions"
        + (
            f" (packs of {survey.max_length} are {1 - survey.padding:.2%} full)" * (survey.layout == "packed")
        ),
        "inference": prompt_words(survey),
    }
    return found


def prompt_words(survey: Survey) -> str:
    check = survey.prompts
    if not check.compared:
        return "no prompts to compare (plain text)"
    if check.same == check.compared:
        return f"the same prompt ids as in training, in {check.compared:,} of {check.compared:,} compared"
    return (
        f"other prompt ids than in training in {check.compared - check.same:,} of {check.compared:,} compared"
    )


def warnings(survey: Survey) -> list[str]:
    """Lines about what is probably not meant."""
    ledger = survey.ledger
    lines = [*ledger.remarks, *overlap.told(survey.shared, survey.documents)]
    lines += worries(ledger)
    if survey.prompts.difference:
        lines.append(f"prompt ids differ at inference, first in {survey.prompts.difference}")
    cut = ledger.notes.get("truncated", 0)
    if cut > 0.1 * ledger.read:
        lines.append(
            f"{cut / ledger.read:.0%} of rows end at {survey.max_length} tokens; such an answer has no end: "
            "raise train.max_length, or choose data.overlong"
        )
    lost = sum(ledger.dropped.values())
    if lost > 0.1 * ledger.read:
        lines.append(f"{lost / ledger.read:.0%} of rows are dropped; the page's ledger says which and why")
    if survey.layout == "padded" and survey.padding > 0.2:
        lines.append(
            f"{survey.padding:.0%} of positions are padding; train.packing=true or "
            "train.group_by_length=true would spare them"
        )
    return lines


def worries(ledger: Ledger) -> list[str]:
    """Notes that are probably not meant, a line for each, with the first rows."""
    lines = []
    for note in WORRYING:
        if count := ledger.notes.get(note):
            rows = ledger.noted[note]
            more = ", …" * (count > len(rows))
            lines.append(f"{count:,} rows {NOTES[note]} ({', '.join(rows)}{more})")
    return lines


def _example(document: BatchDocument) -> RenderableType:
    text = Text()
    for token in document.tokens[:EXAMPLE_TOKENS]:
        style = "black on green" if token.weight else "magenta" if token.special else "dim"
        text.append(token.text, style)
    if len(document.tokens) > EXAMPLE_TOKENS:
        text.append(f" … {len(document.tokens) - EXAMPLE_TOKENS} more tokens", "italic")
    legend = Text.assemble(
        ("supervised", "black on green"), "  ", ("context", "dim"), "  ", ("special", "magenta")
    )
    return Panel(Group(text, Text(), legend), title=Text(document.where), title_align="left")


def _histogram(survey: Survey) -> RenderableType:
    most = max(count for _, _, count in survey.histogram)
    table = Table(
        title="training documents by length",
        title_justify="left",
        box=None,
        pad_edge=False,
        show_header=False,
    )
    for low, high, count in survey.histogram:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        table.add_row(Text(f"{low:,}–{high:,} tokens", justify="right"), Text(bar, "green"), f"{count:,}")
    return table
