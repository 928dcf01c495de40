"""What a run left: base beside tuned on held-out rows, exports beside the model that was trained, and files.

In: `RunFiles`. Out: sections for the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.evaluate.fullest import LATEST
from qlora_trainer.evaluate.report import ROWS
from qlora_trainer.track.report_files import RunFiles
from qlora_trainer.track.report_view import Cell, Row, Section, Table, clip, date, form, megabytes

EXAMPLES = 40  # of each source; evaluation.json has all
CHECKPOINTS = 100


def evaluation(files: RunFiles) -> Section | None:
    """Base beside tuned on each held-out source, and the answers that evaluation.json has."""
    if not files.evaluation and not files.lm_eval:
        return None
    blocks: list[Table] = []
    for source, scores, title in _results(files.evaluation):
        base, tuned = scores["base"], scores["tuned"]
        rows: list[Row] = []
        for key, (label, pattern) in ROWS.items():
            if key in base or key in tuned:
                rows.append(
                    [label, form(base.get(key), pattern), Cell(form(tuned.get(key), pattern), "strong")]
                )
            if key == "exact_match":
                rows += [
                    [Cell(f"  {clip(Path(name).name)}", "soft"), *_shares(base, tuned, name)]
                    for name in tuned.get("exact_match_by_source", {})
                ]
        blocks.append(Table(("", "base", "tuned"), rows, caption=f"{title}: {clip(source)}"))
        examples = scores.get("examples", [])
        if examples:
            shown = [_example(example) for example in examples[:EXAMPLES]]
            left_out = (
                [f"{len(examples) - EXAMPLES} more are in evaluation.json"]
                if len(examples) > EXAMPLES
                else []
            )
            blocks.append(
                Table(("prompt", "reference", "base", "tuned"), shown, notes=left_out, kind="examples")
            )
    rows = [
        [
            clip(f"{task} {metric}{title.removeprefix('held-out rows')}"),
            *(Cell(form(values[side], "{:.4f}"), "strong" * (side == "tuned")) for side in ("base", "tuned")),
        ]
        for task, found, title in _results(files.lm_eval)
        for metric, values in found["metrics"].items()
    ]
    if rows:
        blocks.append(Table(("", "base", "tuned"), rows, caption="lm-evaluation-harness"))
    return Section("Evaluation", blocks)


def _results(stored: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, result, title): of each name the fullest, and the latest where that measured less."""
    for name, found in stored.items():
        latest = found.get(LATEST)
        rows = found.get("rows")
        yield name, found, "held-out rows" if latest is None else f"held-out rows, {rows} of them"
        if latest is not None:
            yield name, latest, f"held-out rows, the latest {latest.get('rows')}"


def _shares(base: dict[str, Any], tuned: dict[str, Any], name: str) -> list[str]:
    return [form(side.get("exact_match_by_source", {}).get(name), "{:.1%}") for side in (base, tuned)]


def _example(example: dict[str, Any]) -> list[Cell | str]:
    answers = [
        Cell(clip(example[side]) or "(nothing)", "right" if example[f"{side}_right"] else "wrong")
        for side in ("base", "tuned")
    ]
    return [clip(example["prompt"]), clip(example["reference"]), *answers]


_MEASURES = (  # label, key of verify.json, format
    ("KL, nats a token", "kl", "{:.4f}"),
    ("bound", "max_kl", "{:g}"),
    ("top-1 agrees", "top1", "{:.1%}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("largest logit difference", "max_logit_difference", "{:.2f}"),
    ("exact match", "exact_match", "{:.0%}"),
    ("size, MB", "bytes", "size"),
    ("load, s", "load_seconds", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.1f}"),
)


def exports(files: RunFiles) -> Section | None:
    """One table for all exports that were measured on the same rows beside the same trained model."""
    if not files.exports:
        return None
    groups: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
    measured = [found for found in files.exports.values() if found is not None]
    for found in [*measured, *(found[LATEST] for found in measured if LATEST in found)]:
        if found["models"]:
            first = found["models"][0]
            key = (str(found["measured_on"]), (first["tokens"], first["perplexity"]))
            groups.setdefault(key, {}).update({model["model"]: model for model in found["models"]})
    blocks = [_measured(measured_on, list(models.values())) for (measured_on, _), models in groups.items()]
    unmeasured = [name for name, found in files.exports.items() if found is None]
    notes = [Cell(f"not verified: {clip(', '.join(unmeasured))}", "warn")] if unmeasured else []
    return Section("Exports", blocks, notes)


def _measured(measured_on: str, models: Sequence[dict[str, Any]]) -> Table:
    """The trained model and the base alone first, as verify.json has them."""
    wanted = [measure for measure in _MEASURES if any(model.get(measure[1]) is not None for model in models)]
    rows: list[Row] = []
    for model in models:
        held = "max_kl" in model
        verdict = ("passed", "good") if model["passed"] else ("failed", "bad")
        rows.append(
            [
                Cell(clip(model["model"]), "strong" if held else ""),
                Cell(*verdict) if held else "",
                *(_figure(model.get(key), pattern) for _, key, pattern in wanted),
            ]
        )
    failures = [
        Cell(f"{clip(model['model'])}: {clip(failure)}", "bad")
        for model in models
        for failure in model["failures"]
    ]
    columns = ("model", "", *(label for label, _, _ in wanted))
    return Table(columns, rows, f"measured on {clip(measured_on)}, each in a fresh process", failures)


def _figure(value: float | None, pattern: str) -> str:
    if value is None:
        return ""
    return megabytes(value) if pattern == "size" else pattern.format(value)


def checkpoints(files: RunFiles) -> Section | None:
    """What is on the disk: checkpoints and the adapter."""
    rows: list[Row] = []
    kept = files.checkpoints[-CHECKPOINTS:]
    best = kept[-1].about.get("best_step") if kept else None
    for saved in kept:
        about = saved.about
        loss = about.get("best_loss") if about.get("step") == best else None
        rows.append(
            [
                Cell(clip(f"checkpoints/{saved.name}"), "code"),
                form(about.get("tokens"), "{:,}"),
                Cell(form(loss, "{:.4g}, the best"), "good"),
                megabytes(saved.size),
                date(saved.written),
            ]
        )
    if files.adapter is not None:
        rows.append(
            [Cell("adapter", "code"), "", "", megabytes(files.adapter.size), date(files.adapter.written)]
        )
    if not rows:
        return None
    return Section("On disk", [Table(("", "tokens read", "held-out loss", "MB", "written"), rows)])
