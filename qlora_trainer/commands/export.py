"""Export a finished run, or any PEFT adapter, as the files others read; each is reloaded and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qlora_trainer.config.frozen import as_dict
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.export import calibration, hub
from qlora_trainer.export.base import Held
from qlora_trainer.export.formats import Exporter
from qlora_trainer.export.snippet import base_name
from qlora_trainer.export.source import ExportOptions, Rows, Source
from qlora_trainer.jobs import page, wiring
from qlora_trainer.jobs.verification import exports_folder, subject, verify_exports
from qlora_trainer.model.load import DTYPES, load_base, pick_device
from qlora_trainer.system.disk import lock, require_place
from qlora_trainer.system.terminal import console


def run(config: RunConfig) -> None:
    """Exports every format asked for, then verifies them all, then pushes those that passed.

    Raises:
        DivergedError: an export is over its bound; it stays where it is and its card says so.
    """
    wanted = config.export
    device = pick_device(config.model.device)
    root = exports_folder(config)
    for place in (root, *(root / kind for kind in wanted.format)):
        require_place(place)
    source = source_of(config)
    if wanted.push_to_hub is not None:
        hub.check(wanted.push_to_hub)
    bars = Progress(TextColumn("{task.description:>8}"), BarColumn(), TimeElapsedColumn(), console=console)
    tasks: dict[str, TaskID] = {}

    def progress(kind: str) -> Callable[[int, int], None]:
        tasks[kind] = bars.add_task(kind, total=None)
        return lambda done, total: bars.update(tasks[kind], completed=done, total=total)

    def export(kind: str) -> Path:
        folder = exporter.export(kind)
        if kind in tasks:  # not all report their progress; a finished bar's clock stands still
            bars.update(tasks[kind], completed=1, total=1)
        return folder

    dtype = None if wanted.dtype == "auto" else DTYPES[wanted.dtype]
    options = wiring.taken(ExportOptions, wanted, dtype=dtype)
    exporter = Exporter(source, options, root, device, _calibration(config, source, device), progress)
    exporter.check(wanted.format)  # before the lock, which makes a file
    for kind in wanted.format:
        for limit in exporter.limits(kind):
            console.print(f"{kind:>8}  {limit}", style="yellow")
    with lock(root), bars:  # the lock also clears what an interrupted export left
        folders = {kind: export(kind) for kind in wanted.format}
    for kind, folder in folders.items():
        console.print(f"{kind:>8}  {folder}")
    if wanted.verify:
        verify_exports(config, folders)
    else:
        page.refresh(root.parent)
    if wanted.push_to_hub is not None:
        for kind, folder in folders.items():
            name = wanted.push_to_hub if len(folders) == 1 else f"{wanted.push_to_hub}-{kind}"
            url = hub.push(folder, name, private=wanted.hub_private)
            console.print(f"{kind:>8}  {url}")


def source_of(config: RunConfig) -> Source:
    """The adapter with its base and how that was held: as recorded beside it, else as configured."""
    what = subject(config)
    ours = config.export.adapter is None and what.adapter is not None
    return Source(
        adapter=what.adapter,
        base=what.source,
        name=base_name(what.options.name_or_path),
        revision=what.options.revision,
        held=Held(what.options.method, what.options.double_quant, what.options.dtype),
        tokenizer=what.tokenizer,
        stop_ids=what.stop_ids,
        rows=Rows(**what.record.get("rows", {})),
        data=_data_names(config) if ours else [],
        settings=as_dict(config) if ours else {},
    )


def _data_names(config: RunConfig) -> list[str]:
    paths = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    return [str(path["path"] if isinstance(path, dict) else path) for path in paths if path]


def _calibration(
    config: RunConfig, source: Source, device: torch.device
) -> Callable[[], Sequence[Sequence[int]]]:
    wanted = config.export
    kinds = wanted.calibration if isinstance(wanted.calibration, list) else [wanted.calibration]
    length, seed, tokenizer = wanted.calibration_length, config.seed, source.tokenizer

    def of(kind: str, samples: int) -> list[list[int]]:
        if kind == "self":
            console.print(f"calibrating on {samples} x {length} tokens that the base makes up", style="dim")
            base = load_base(subject(config).options, device)
            return calibration.made_up(base, tokenizer, samples, length, seed)
        if kind != "train":
            text = calibration.load_text(kind, tokenizer, length, samples)
            return calibration.sequences(text, samples, length, seed)
        if config.data.path is None:
            raise ConfigError(
                "export.calibration=train: this adapter brings no training data; name some with "
                "data.path=FILE, or set export.calibration=self, c4, wikitext or a file"
            )
        return calibration.sequences(wiring.load_data(config, tokenizer), samples, length, seed)

    @cache
    def sequences() -> Sequence[Sequence[int]]:
        shares = calibration.shares(wanted.calibration_samples, len(kinds))
        return [row for kind, share in zip(kinds, shares, strict=True) for row in of(kind, share)]

    return sequences
