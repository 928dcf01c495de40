"""The top of a run's page: its state, the figures that matter, what it ran on, how often it was started.

In: `RunFiles`. Out: the headline and the table of starts.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.track.report_files import RunFiles
from qlora_trainer.track.report_view import (
    Cell,
    Facts,
    Headline,
    Row,
    Section,
    Table,
    clip,
    count,
    date,
    duration,
    gib,
    moment,
)

SHORT = 24  # characters of a source's name in the headline
STARTS = 30  # the last ones, in the table of starts
DIVERGED = 3  # exit code

_TONES = {"done": "good", "stopped": "warn", "running": "calm"}


@dataclass(frozen=True)
class Session:
    """One start of the command, up to where it ended or was last heard of."""

    started: datetime
    ended: datetime
    state: str
    first: int
    last: int
    measured: dict[str, Any]

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


def sessions(status: dict[str, Any]) -> list[Session]:
    """Every start that made a step, oldest first."""
    records = [*status.get("sessions", []), status]
    return [
        Session(
            moment(record["started"]),
            moment(record["updated"]),
            "killed"
            if record["state"] in ("running", "stopping") and record is not status
            else record["state"],
            int(record["first_step"]),
            int(record["step"]),
            record.get("measured", {}),
        )
        for record in records
        if "first_step" in record and "step" in record and "started" in record
    ]


def resumed_at(status: dict[str, Any]) -> list[int]:
    """Steps after which a later start went on, for the curves of the steps that are in metrics.jsonl now."""
    firsts = [session.first for session in sessions(status)]
    begun = max((at for at, first in enumerate(firsts) if first == 0), default=0)
    return sorted({first for first in firsts[begun:] if first > 0})


def headline(files: RunFiles) -> Headline:
    status, series = files.status, files.series
    state = str(status.get("state", "unknown"))
    if state == "failed" and status.get("exit_code") == DIVERGED:
        state = "diverged"
    step = max(int(series.steps[-1]) if len(series) else 0, int(status.get("step", 0)))
    total = status.get("total_steps") or files.plan.get("steps")
    progress = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    if (epoch := series.last("epoch")) is not None:
        progress += f", epoch {epoch:.2f}"
    return Headline(
        name=files.name,
        state={"running": "running when this was written"}.get(state, state),
        tone=_TONES.get(state, "bad" if state in ("failed", "diverged") else "warn"),
        progress=progress,
        message=clip(status.get("message") or ""),
        figures=_figures(files),
        facts=_facts(files, state),
    )


def _figures(files: RunFiles) -> list[tuple[str, str, str]]:
    series = files.series
    found: list[tuple[str, str, str]] = []
    for label, name in (("training loss", "loss"), ("held-out loss", "eval_loss")):
        values = series.finite(name)
        if values.size:
            found.append((label, f"{values[-1]:.4g}", f"from {values[0]:.4g}" if values.size > 1 else ""))
    for source, scores in files.evaluation.items():
        base, tuned = scores["base"], scores["tuned"]
        if "exact_match" in tuned:
            name = Path(source).name[:SHORT]
            label = "exact match" if len(files.evaluation) == 1 else f"exact match, {name}"
            found.append((label, f"{tuned['exact_match']:.0%}", f"base {base['exact_match']:.0%}"))
    tokens = series.finite("tokens")
    if tokens.size:
        found.append(("tokens read", count(float(tokens.sum())), ""))
    speeds = series.finite("tokens_per_second")
    if speeds.size:
        planned = files.plan.get("tokens_per_second")
        found.append(("tokens/s", f"{np.median(speeds):,.0f}", f"planned {planned:,.0f}" if planned else ""))
    measured = last_measured(files)
    for label, name in (("peak GPU memory", "peak_allocated"), ("peak RAM", "peak_host")):
        if name in measured:
            found.append((label, f"{gib(measured[name])} GiB", ""))
            break
    return found


def last_measured(files: RunFiles) -> dict[str, Any]:
    """Peaks of the last start that trained; runs of earlier versions have them in plan.json alone."""
    found = [session.measured for session in sessions(files.status) if session.measured]
    return found[-1] if found else files.plan.get("measured", {})


def _facts(files: RunFiles, state: str) -> Facts:
    status, config, plan = files.status, files.config, files.plan
    items: list[tuple[str, Row]] = []
    model, quantization, lora = (config.get(name, {}) for name in ("model", "quantization", "lora"))
    if model:
        method = str(quantization.get("method"))
        double = " + double quantization" * (
            bool(quantization.get("bnb_4bit_use_double_quant")) and method in ("nf4", "fp4")
        )
        shape = f"{count(plan['parameters'])} parameters" if "parameters" in plan else ""
        adapter = f"LoRA r={lora['r']} α={lora['lora_alpha']:g} on {clip(lora['target_modules'])}"
        if "trainable" in plan:
            adapter += f", {count(plan['trainable'])} trained"
        items.append(
            (
                "model",
                [Cell(clip(model.get("model_name_or_path")), "strong"), shape, method + double, adapter],
            )
        )
    started = sessions(status)
    if started:
        spent = duration(sum(session.seconds for session in started))
        starts = f"in {len(started)} starts" if len(started) > 1 else ""
        when = f"{date(started[0].started)} to {date(started[-1].ended)}"
        items.append(("when", [when, f"{spent} of work", starts]))
    elif "updated" in status:
        items.append(("when", [f"last heard of {date(moment(status['updated']))}"]))
    items += _surroundings(files)
    if state == "done" and files.adapter is not None:
        for name in ("chat", "evaluate", "export"):
            items.append(
                (name, [Cell(f"python -m qlora_trainer {name} run={shlex.quote(files.folder)}", "code")])
            )
    elif "command" in status:
        items.append(("to go on", [Cell(clip(status["command"]), "code")]))
    if state == "done" and "command" in status:
        items.append(("made by", [Cell(clip(status["command"]), "code")]))
    return Facts(items)


def _surroundings(files: RunFiles) -> list[tuple[str, Row]]:
    """Machine and libraries; of a run that recorded neither, what its plan and checkpoints know."""
    items: list[tuple[str, Row]] = []
    machine = files.status.get("machine", {})
    device = machine.get("device") or files.plan.get("hardware", {}).get("name")
    if device:
        processes = machine.get("processes", 1)
        threads = machine.get("CPU threads")
        shown = [
            clip(device) + (f" × {processes}" if processes != 1 else ""),
            f"{threads} CPU thread{'s' * (threads != 1)}" if threads else "",
        ]
        items.append(("machine", shown))
    versions = files.status.get("versions") or (files.checkpoints[-1].about if files.checkpoints else {}).get(
        "versions", {}
    )
    if versions:
        items.append(("libraries", [f"{clip(name)} {clip(value)}" for name, value in versions.items()]))
    return items


def starts(files: RunFiles) -> Section | None:
    """A table of the starts, where there was more than one."""
    found = sessions(files.status)
    if len(found) < 2:
        return None
    rows: list[Row] = [
        [
            date(session.started),
            f"{session.first:,}",
            f"{session.last:,}",
            duration(session.seconds),
            Cell(session.state, _TONES.get(session.state, "bad")),
        ]
        for session in found[-STARTS:]
    ]
    left_out = [f"the last {STARTS} of {len(found)}"] if len(found) > STARTS else []
    return Section(
        "Starts", [Table(("started", "after step", "up to step", "took", "ended"), rows)], left_out
    )
