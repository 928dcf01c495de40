"""What a run was given and what was foretold of it: the plan beside what was measured, data, configuration.

In: `RunFiles`, and for the configuration its defaults and its recipe's values. Out: sections for the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_trainer.track.report_files import RunFiles
from qlora_trainer.track.report_headline import last_measured
from qlora_trainer.track.report_view import (
    Cell,
    Fold,
    Row,
    Section,
    Table,
    binary_unit,
    clip,
    duration,
    gib,
    off,
)

MARGIN = 0.20  # what the plan promises of times; also where its sum of RAM is called off
ELSEWHERE = ("recipe", "output_dir", "run")  # keys that name the run and do not shape it


def planned(files: RunFiles) -> Section | None:
    """Predicted beside measured, and the predicted memory by part and phase."""
    if not files.plan:
        return None
    rows = [*_times(files), *_peaks(files)]
    beside = [Table(("", "planned", "measured", "off by"), rows)] if rows else []
    notes = [clip(note) for note in files.plan.get("notes", [])]
    return Section("Plan", [*beside, _memory(files.plan)], notes)


def _times(files: RunFiles) -> Iterator[Row]:
    plan, series = files.plan, files.series
    seconds, speeds = series.seconds_per_step(), series.finite("tokens_per_second")
    for label, key, values, show in (
        ("step, median", "seconds_per_step", seconds, duration),
        ("tokens/s, median", "tokens_per_second", speeds, "{:,.0f}".format),
    ):
        if plan.get(key) and values.size:
            median = float(np.median(values))
            yield [label, show(plan[key]), show(median), off(plan[key], median, MARGIN)]
    if plan.get("seconds_per_step") and seconds.size:
        done = int(series.steps[-1])
        ahead, taken = plan["seconds_per_step"] * done, float(seconds.mean()) * done
        label = f"{done:,} steps without evaluation and saving"
        yield [label, duration(ahead), duration(taken), off(ahead, taken, MARGIN)]


def _peaks(files: RunFiles) -> Iterator[Row]:
    """Only sums are measured: neither the system nor torch says what memory is used for."""
    plan, measured = files.plan, last_measured(files)
    if "peak_allocated" in measured and plan.get("peak_allocated"):
        yield _sizes("GPU memory, peak", plan["peak_allocated"], measured["peak_allocated"], plan["margin"])
    if "peak_host" in measured and plan.get("peak_host"):
        yield _sizes("RAM, peak", plan["peak_host"], measured["peak_host"], MARGIN)


def _sizes(label: str, ahead: float, seen: float, margin: float) -> Row:
    unit, show = binary_unit(max(ahead, seen))
    return [label, f"{show(ahead)} {unit}", f"{show(seen)} {unit}", off(ahead, seen, margin)]


def _memory(plan: Mapping[str, Any]) -> Table:
    """Parts by phase, the phase that needs most in bold."""
    phases = plan["phases"]
    totals = [sum(phase["parts"].values()) for phase in phases]
    peak = totals.index(max(totals))
    unit, show = binary_unit(totals[peak])
    rows: list[Row] = []
    for name in phases[0]["parts"]:
        sizes = [phase["parts"][name] for phase in phases]
        if any(sizes):
            cells = [
                Cell(show(size) if size else "–", "strong" * (at == peak)) for at, size in enumerate(sizes)
            ]
            rows.append([clip(name), *cells])
    rows.append([Cell("in all", "strong"), *(Cell(show(total), "strong") for total in totals)])
    where = "GPU memory" if plan["hardware"]["device"] == "cuda" else "memory"
    caption = f"{where} planned at the peak of each phase, {unit}; {gib(plan['budget'])} GiB may be used"
    return Table(("", *(clip(phase["name"]) for phase in phases)), rows, caption)


def data(files: RunFiles) -> Section | None:
    """Sources, rows, tokens, and what was dropped and why."""
    parts = files.status.get("data")
    if not parts:
        return None
    rows: list[Row] = []
    remarks: list[Row] = []
    for part in parts:
        source = clip(", ".join(part["sources"]))
        dropped = sum(part["dropped"].values())
        rows.append(
            [
                Cell(source, "strong"),
                clip(f"{part['role']}, {'/'.join(part['formats'])}"),
                f"{part['rows']:,}",
                Cell(f"{dropped:,}", "warn" if dropped else ""),
                f"{part['documents']:,}",
                f"{part['tokens']:,}",
                f"{part['supervised'] / part['tokens']:.0%}",
                f"{part['longest']:,}",
            ]
        )
        for what, found in (("dropped", part["dropped"]), ("kept", part["notes"])):
            remarks += [[clip(why), what, source, f"{number:,}"] for why, number in found.items()]
        remarks += [[clip(line), "passed over", source, ""] for line in part.get("remarks", [])]
    columns = ("source", "", "rows", "dropped", "documents", "tokens", "supervised", "longest")
    explained = [Table(("what happened to rows", "", "", "rows"), remarks)] if remarks else []
    return Section("Data", [Table(columns, rows), *explained])


def configuration(files: RunFiles, defaults: Mapping[str, Any], recipe: Mapping[str, Any]) -> Section | None:
    """Every key; first those that are not at their default, or not as the recipe has them.

    Args:
        defaults: of every key, nested as in config.yaml.
        recipe: dotted key -> value as the run's recipe sets it; empty if that is not known.
    """
    if not files.config:
        return None
    usual = dict(_flat(defaults))
    changed: list[Row] = []
    rest: list[Row] = []
    for key, value in _flat(files.config):
        default = usual.get(key)
        wanted = recipe.get(key, default)
        if key in ELSEWHERE:
            continue
        if value == default == wanted:
            rest.append([Cell(clip(key), "code"), Cell(_written(value), "code")])
            continue
        origin = "recipe" if key in recipe and value == wanted else "command line"
        changed.append(
            [
                Cell(clip(key), "code"),
                Cell(_written(value), "code strong"),
                Cell(_written(default), "code soft"),
                Cell(origin if recipe else "recipe or command line", "soft" * (origin == "recipe")),
            ]
        )
    return Section(
        "Configuration",
        [
            Table(("not at its default", "value", "default", "set by"), changed, kind="keys"),
            Fold(f"{len(rest)} keys at their default", Table(("key", "value"), rest, kind="keys")),
        ],
    )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys: the sections are the mappings at the top; one below (`data.columns`) is a value."""
    for name, value in nested.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, str):
        return clip(value)
    if isinstance(value, list):
        return clip("[" + ", ".join(_written(item) for item in value) + "]")
    return clip(json.dumps(value, ensure_ascii=False, default=str))
