"""Is the export the model that was trained? Reloaded in a fresh process, measured, and held to a bound.

In: an adapter and exports of it, held-out rows. Out: a `Verdict` for each export, `verify.json` beside its
files, and one table with the trained model and the base alone above them: an export that lost the
tuning stands next to the base.

Divergence is KL(trained ‖ export) in nats a token over the tokens that carry a label. An export passes
(`judge`) if

    merged onto the base as trained, its every tensor is base + adapter, rounded once (`equality`),
    it diverges by at most its bound (BOUNDS, or export.max_kl),
    it is far nearer to the trained model than the base is (KEEPS): otherwise the tuning is lost,
    it turns the same conversation, and each row given as text, into the same token ids,
    it stops at every token that the trained model stops at,
    and its answers end with a stop token as often as the trained model's do (less one in ten).

The base alone is the base before anything was trained: without adapter and without `modules_to_save`. An
export that cannot be loaded has failed too, and the others are measured all the same.

`verify.json` beside an export holds `measured_on` (what the rows are), how much that is (`rows`, `questions`,
`max_new_tokens`), the digest of the `adapter`, and `models`: the trained model, the base alone and this
export, or, in `exports/verify.json`, every one. It is the fullest of the results on the same files; a later
one that measured less is its `latest`. Of each model, where it was measured:

    model passed failures                     name, true or false, sentences
    kl top1 max_logit_difference              to the trained model: nats a token, a share, logits
    perplexity tokens                         of the rows, and how many tokens were measured
    exact_match json_match stopped            shares of the questions; answers that ended with a stop token
    load_seconds tokens_per_second            of loading and of generating
    bytes sha256 max_kl                       of an export: its size, file -> digest, and its bound
    prompt_ids stop_ids                       token ids of CONVERSATION, and those that end an answer
    texts texts_differ                        rows given as text, and how many became other token ids
    weights                                   of a merged export: tensors compared, unequal, largest, strays
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.evaluate.match import Question, match
from qlora_trainer.export.card import markdown_table, with_measured
from qlora_trainer.export.fingerprint import sha256, size_on_disk
from qlora_trainer.export.judge import AGAIN, BOUNDS, Failure, judge, nats
from qlora_trainer.export.record import RESULT, store
from qlora_trainer.export.worker_log import last_line
from qlora_trainer.inference.load import ADAPTER_WEIGHTS
from qlora_trainer.inference.records import read_json
from qlora_trainer.system.disk import write_text

CONVERSATION = [
    {"role": "user", "content": "  Two spaces, 1234 digits and äöü —  what is 12+34?"},
    {"role": "assistant", "content": "46"},
    {"role": "user", "content": "And in  Roman numerals?\n"},
]


@dataclass(frozen=True)
class Sample:
    """What every model is measured on.

    Attributes:
        rows: token ids and, for each, whether predicting it is measured.
        questions: what is asked; empty for no task.
        source: where the rows came from, for the report.
    """

    rows: Sequence[tuple[Sequence[int], Sequence[bool]]]
    questions: Sequence[Question]
    source: str


@dataclass(frozen=True)
class Yardstick:
    """The model that was trained, and how to load it.

    Attributes:
        adapter: its folder; None where a base by itself was converted: then that is the yardstick.
        base: hub name or folder.
        trained: the contents of training.json (see `export.adapter.TrainedOn`).
        stop_ids: that end its answers.
        dtype: exports compute in: `float32` on a CPU, whose bfloat16 would cover what is measured.
        device: cpu | cuda.
    """

    adapter: Path | None
    base: str
    trained: Mapping[str, Any]
    stop_ids: Sequence[int]
    dtype: str
    device: str


@dataclass(frozen=True)
class Verdict:
    """What was measured of one model, and what is wrong with it."""

    name: str
    measured: Mapping[str, Any]
    failures: tuple[Failure, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


def verify(
    yardstick: Yardstick,
    exports: Mapping[str, Path],
    sample: Sample,
    *,
    max_kl: float | None = None,
    max_new_tokens: int = 64,
    say: Callable[[str], None] | None = None,
) -> list[Verdict]:
    """Verdicts of the trained model, the base alone and each export, in this order.

    Args:
        exports: name of the format -> folder. `verify.json` and the card there get the result (`record`).
        max_kl: bound for all of them, instead of their own.
        say: told what is being measured.

    Raises:
        ConfigError: nothing to measure on, or a folder without export.
        CheckpointError: the trained model or its base cannot be loaded.
    """
    if not any(any(measured[1:]) for _, measured in sample.rows):
        raise ConfigError(f"verify: {sample.source} has no row with a labelled token to measure on")
    for name, folder in exports.items():
        if not folder.is_dir():
            raise ConfigError(f"verify: no {name} export at {folder}; make it with export.format=[{name}]")
    recipes = {name: read_json(folder / "export.json") for name, folder in exports.items()}
    merged = {name: str(exports[name]) for name, recipe in recipes.items() if _kind_of(recipe) == "merged"}
    texts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qlora-verify-") as work:

        def probe(name: str, kind: str, folder: Path) -> dict[str, Any]:
            if say is not None:
                say(name)
            dtype = "bfloat16" if kind == "awq" and yardstick.device == "cpu" else yardstick.dtype
            request = {
                "kind": kind,
                "folder": str(folder),
                "base": yardstick.base,
                "trained": dict(yardstick.trained),
                "dtype": dtype,
                "device": yardstick.device,
                "rows": [{"ids": list(ids), "measured": list(measured)} for ids, measured in sample.rows],
                "texts": texts,
                "merged": merged,
                "logits": work,
                "conversation": CONVERSATION,
                "prompts": [list(question.prompt_ids) for question in sample.questions],
                "stop_ids": list(yardstick.stop_ids),
                "max_new_tokens": max_new_tokens,
            }
            measured = run_probe(name, request, Path(work))
            answers = measured.pop("answers")
            if sample.questions:
                score = match(sample.questions, answers)
                measured["exact_match"] = score.exact
                if score.json_equal is not None:
                    measured["json_match"] = score.json_equal
            return measured

        tuned, base = yardstick.adapter, None
        if tuned is None:
            trained = probe("base", "plain", Path(yardstick.base))
        else:
            trained = probe("trained model", "trained", tuned)
        weights = trained.pop("weights")
        texts = trained.pop("texts")
        if tuned is not None:
            base = probe("base alone", "base", tuned)
        verdicts = [Verdict("trained model" if base else "base", trained | {"kl": 0.0, "top1": 1.0})]
        if base is not None:
            verdicts.append(Verdict("base alone", base))
        first = tuple(verdicts)
        for name, folder in exports.items():
            kind = _kind_of(recipes[name])
            bound = BOUNDS[kind] if max_kl is None else max_kl
            measured = {"bytes": size_on_disk(folder), "sha256": digests(folder), "max_kl": bound}
            try:
                measured |= probe(name, str(recipes[name]["format"]), folder)
                measured |= {"weights": weights[name]} if name in weights else {}
                failures = judge(kind, measured, trained, base, len(sample.questions))
            except CheckpointError as error:
                failures = (Failure(str(error).removeprefix(f"{name} "), AGAIN),)
            verdicts.append(Verdict(name, measured, failures))
            one = [*first, verdicts[-1]]
            if store(folder / RESULT, result(one, yardstick, sample, max_new_tokens)):
                _measure_card(folder / "README.md", markdown(one, sample))
    return verdicts


def table(verdicts: Sequence[Verdict], sample: Sample) -> Table:
    """For the terminal, narrow enough for 80 columns."""
    title = f"verified on {sample.source}"
    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns, rows = _cells(verdicts, narrow=True)
    for column in columns:
        shown.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for verdict, row in zip(verdicts, rows, strict=True):
        shown.add_row(*row, style=None if verdict.passed else "red")
    return shown


def markdown(verdicts: Sequence[Verdict], sample: Sample) -> str:
    """For the card and the run's page."""
    text = [f"Measured on {sample.source}, each model reloaded in a fresh process.", ""]
    text.append(markdown_table(*_cells(verdicts)))
    for verdict in verdicts:
        text += [f"\n**{verdict.name} failed:** {failure.text}." for failure in verdict.failures]
    return "\n".join(text)


def result(
    verdicts: Sequence[Verdict], yardstick: Yardstick, sample: Sample, max_new_tokens: int
) -> dict[str, Any]:
    """What `verify.json` has of these verdicts."""
    adapter = yardstick.adapter and yardstick.adapter / ADAPTER_WEIGHTS
    return {
        "measured_on": sample.source,
        "rows": len(sample.rows),
        "questions": len(sample.questions),
        "max_new_tokens": max_new_tokens if sample.questions else 0,
        "adapter": sha256(adapter) if adapter and adapter.is_file() else "",
        "models": [as_dict(verdict) for verdict in verdicts],
    }


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Plain values for JSON."""
    failures = [failure.text for failure in verdict.failures]
    return {"model": verdict.name, "passed": verdict.passed, "failures": failures, **verdict.measured}


def digests(folder: Path) -> dict[str, str]:
    """File -> sha256 of all that a loader reads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (RESULT, "README.md"):
            found[str(path.relative_to(folder))] = sha256(path)
    return found


def _kind_of(recipe: Mapping[str, Any]) -> str:
    original = recipe.get("merge_base") == "original" and recipe["format"] != "adapter"
    return "original" if original else str(recipe["format"])


def run_probe(name: str, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """One measurement in a fresh process; CheckpointError with its last line if that fails."""
    asked, answered, log = work / "request.json", work / "result.json", work / "log.txt"
    asked.write_text(json.dumps(request), encoding="utf-8")
    answered.unlink(missing_ok=True)
    with log.open("wb") as output:
        code = subprocess.call(
            [sys.executable, "-m", "qlora_trainer.export.probe", str(asked), str(answered)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if code or not answered.is_file():
        raise CheckpointError(
            f"{name} cannot be loaded and measured: {last_line(log, code)} ({request['folder']})"
        )
    result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return result


def _measure_card(card: Path, measured: str) -> None:
    if card.is_file():
        write_text(card, with_measured(card.read_text(encoding="utf-8"), measured))


def _cells(verdicts: Sequence[Verdict], narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows; columns that nobody has are left out, and `narrow` leaves out the bound."""
    wanted: list[tuple[str, str, Callable[[Any], str]]] = [
        ("KL", "kl", nats),
        ("bound", "max_kl", lambda v: f"{v:g}"),
        ("top-1", "top1", lambda v: f"{v:.1%}"),
        ("ppl", "perplexity", lambda v: f"{v:.3f}"),
        ("Δlogit", "max_logit_difference", lambda v: f"{v:.2f}"),
        ("match", "exact_match", lambda v: f"{v:.0%}"),
        ("MB", "bytes", lambda v: f"{v / 1e6:.3g}"),
        ("load s", "load_seconds", lambda v: f"{v:.1f}"),
        ("tok/s", "tokens_per_second", lambda v: f"{v:.1f}"),
    ]
    used = [
        (name, key, form)
        for name, key, form in wanted
        if any(verdict.measured.get(key) is not None for verdict in verdicts)
        and not (narrow and key == "max_kl")
    ]
    rows = []
    for verdict in verdicts:
        values = [(form, verdict.measured.get(key)) for _, key, form in used]
        mark = ("✓ " if verdict.passed else "✗ ") if "max_kl" in verdict.measured else ""
        rows.append([mark + verdict.name, *("" if v is None else form(v) for form, v in values)])
    return ["model", *(name for name, _, _ in used)], rows
