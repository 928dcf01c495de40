"""A plan on one screen and as plan.json; the plan itself is made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_trainer.plan.hardware import GIB
from qlora_trainer.plan.plan import RunPlan
from qlora_trainer.system.disk import write_json


def write(plan: RunPlan, path: Path, measured: Mapping[str, float] | None = None) -> None:
    """plan.json, replaced as a whole; after the run with what was `measured` beside what was planned."""
    document = plan.to_dict() | ({"measured": dict(measured)} if measured else {})
    write_json(path, document, durable=False)


def show(plan: RunPlan, console: Console) -> None:
    """Print the plan."""
    console.print(render(plan))


def render(plan: RunPlan) -> RenderableType:
    parts: list[RenderableType] = [_facts(plan), "", _memory(plan)]
    if plan.changes:
        parts += ["", _changes(plan)]
    if plan.notes:
        parts += ["", *(Text(note, "dim") for note in plan.notes)]
    title = Text("plan: fits") if plan.fits else Text("plan: does not fit", "red")
    return Panel(Group(*parts), title=title, title_align="left")


def _facts(plan: RunPlan) -> Table:
    table = Table.grid(padding=(0, 2))
    share = plan.trainable / plan.parameters
    table.add_row("model", f"{plan.model_type}, {count(plan.parameters)} parameters")
    table.add_row("path", _path(plan))
    if plan.share is not None and plan.method != "none":
        table.add_row("quantized", f"{plan.method}, {plan.share}")
    table.add_row("adapter", f"{count(plan.trainable)} trainable parameters ({share:.2%})")
    device, size = plan.hardware, f"{gib(plan.hardware.memory)} GiB"
    table.add_row("device", size if device.flops is None else f"{device.name}, {size}")
    table.add_row("activations", _explained(plan.policy_summary()))
    if plan.graphs:
        table.add_row("launches", "CUDA graphs")
    if plan.offload != "none":
        also = ", 4-bit layers too and stream through the device" if plan.offload == "layers" else ""
        table.add_row("offload", f"embeddings live in host memory{also}")
    ranks = f" x {plan.world_size} processes" if plan.world_size > 1 else ""
    table.add_row(
        "step",
        f"{plan.rows} x {plan.length} tokens x {plan.accumulation} accumulated{ranks} = "
        f"{plan.tokens_per_step:,.0f} tokens",
    )
    table.add_row("time", _time(plan))
    table.add_row("host RAM", _against(plan.host, plan.hardware.host_memory))
    table.add_row("disk", _against(plan.disk, plan.hardware.disk))
    table.add_row("merge", f"in `export`, without the GPU: {gib(plan.merging)} GiB of host RAM")
    return table


def _path(plan: RunPlan) -> str:
    if plan.reference_because is not None:
        return f"reference, because {plan.reference_because}"
    if plan.head_because is not None:
        return f"fast; lm_head as the reference, because {plan.head_because}"
    return plan.path


def _time(plan: RunPlan) -> str:
    said = [] if plan.steps is None else [f"{plan.steps:,} steps"]
    if plan.seconds_per_step is not None and plan.tokens_per_second is not None:
        digits = 0 if plan.tokens_per_second >= 10 else 1
        speed = f"{plan.tokens_per_second:,.{digits}f}"
        said.append(f"{duration(plan.seconds_per_step)} a step, {speed} tokens/s")
    if plan.seconds is not None:
        said.append(f"{duration(plan.seconds)} in all")
    if plan.steps is None:
        said.append("how many steps depends on the data")
    return ", ".join(said)


def _explained(policies: str) -> str:
    """`none` alone says little to whoever meets it first."""
    explained = {
        "none": "none: nothing is recomputed",
        "full": "full: every layer is recomputed",
        "full_offload": "full_offload: every layer is recomputed from its input, which waits in host memory",
    }
    return explained.get(policies, policies)


def _against(parts: Mapping[str, int], have: int | None) -> Text:
    """`7.14 of 62.0 GiB: process 3.00, data 4.14`."""
    need = sum(parts.values())
    text = Text(f"{gib(need)} GiB" if have is None else f"{gib(need)} of {gib(have)} GiB")
    if have is not None and need > have:
        text = Text(f"{text}, not enough", "red")
    named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    return Text.assemble(text, f": {named}")


def _memory(plan: RunPlan) -> Table:
    """GiB by part (rows) and phase (columns)."""
    names = [name for name in plan.peak.parts if any(phase.parts[name] for phase in plan.phases)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    where = "device memory" if plan.hardware.device == "cuda" else "memory"
    table.add_column(f"{where} at the peak, GiB")
    phases = [phase for phase in plan.phases if phase.total]  # merging takes none
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for name in names:
        table.add_row(name, *(gib(phase.parts[name]) for phase in phases))
    table.add_row("allocated", *(gib(phase.allocated) for phase in phases), style="dim")
    style = "bold" if plan.peak.total <= plan.budget else "bold red"
    table.add_row(
        f"of {gib(plan.budget)} that may be used", *(gib(phase.total) for phase in phases), style=style
    )
    return table


def _changes(plan: RunPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("cheapest changes")
    table.add_column("peak GiB", justify="right")
    table.add_column("")
    for change in plan.changes:
        verdict = "fits" if change.fits else "not enough alone"
        table.add_row(change.overrides, gib(change.peak), f"{verdict}, {change.consequence}")
    return table


def gib(size: int) -> str:
    """Bytes in GiB, two decimals below ten."""
    value = size / GIB
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def count(number: int) -> str:
    """8_030_261_248 -> 8.03B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.53 s, 4 min, 3.2 h, 12 days."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
