"""A run's folder belongs to one configuration: looked at first, written to only when nothing refuses it.

In: a `RunConfig`. Out: nothing, or the reason why `output_dir` cannot be this run's; and `config.yaml`, once
the start is accepted. What only the files' contents can tell (the same data, the same base) is for
`checkpoint/` to compare; here the settings as they are written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.checkpoint import same
from qlora_trainer.config.facts import CONTENT, SAME
from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.identity import DEFAULTS, identity
from qlora_trainer.config.load import to_yaml
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import CheckpointError, ConfigError, MissingInputError
from qlora_trainer.system import redact
from qlora_trainer.system.untrusted import parse_yaml

CONFIG_FILE = "config.yaml"
WRITTEN_BEFORE = {"plan.json", "inspect.html", "bench.json"}  # by commands that look first
PRODUCTS = ("metrics.jsonl", "adapter", "exports", "evaluation.json", "lm_eval.json")
WORTH_KEEPING = ("checkpoints", *PRODUCTS)
AUTO = "auto"
SMALLEST_RUN = 64 << 20  # bytes


def refuse(config: RunConfig) -> None:
    """Looks whether a training run of `config` may begin or go on in its `output_dir`; writes nothing.

    Raises:
        ConfigError: the folder holds a run of other settings, or files that are no run's.
        CheckpointError: it cannot be made or written to, or the disk is full.
        MissingInputError: the checkpoint that is named is not there.
    """
    assert config.output_dir, "checks.missing lets no training run pass without an output_dir"
    folder = Path(config.output_dir)
    _refuse_place(folder)
    mode = config.checkpoint.resume_from_checkpoint
    if mode not in ("auto", "never") and not Path(mode).exists():
        raise MissingInputError(
            f"checkpoint.resume_from_checkpoint={mode}: there is no such folder; "
            "name a checkpoint folder, or auto, or never"
        )
    if not (folder / CONFIG_FILE).is_file():
        _refuse_strangers(folder)
    elif holds_a_run(folder) and mode != "never":
        _refuse_another(folder, config)


def holds_a_run(folder: Path) -> bool:
    """Whether an earlier start left anything there: one that failed before its first step has not."""
    return any((folder / name).exists() for name in WORTH_KEEPING)


def configuration(config: RunConfig) -> bytes:
    """What `config.yaml` says of a run, without secrets."""
    return to_yaml(config).encode()


def _refuse_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is a file"
        raise CheckpointError(
            f"output_dir: {folder} cannot be made, {there} {reason}; set output_dir=/elsewhere"
        )
    free = shutil.disk_usage(there).free
    if free < SMALLEST_RUN:
        raise CheckpointError(
            f"output_dir: the disk of {folder} has {free >> 20} MiB free and a run needs "
            f"{SMALLEST_RUN >> 20} MiB at least; set output_dir=/another/disk, or make room"
        )


def _refuse_strangers(folder: Path) -> None:
    entries = folder.iterdir() if folder.is_dir() else ()
    names = {entry.name for entry in entries if not entry.name.startswith(".")}
    if strangers := sorted(names - WRITTEN_BEFORE):
        raise ConfigError(
            f"output_dir: {folder} holds {strangers[0]} and no {CONFIG_FILE}, so it is no run's; "
            f"set output_dir to another folder, or remove {folder}"
        )


def _refuse_another(folder: Path, config: RunConfig) -> None:
    """By what is written down; what a side leaves to the machine (`auto`) is compared when it is settled."""
    # Names of models and data stand for content, and a checkpoint knows what the content was.
    kinds = (SAME,) if any((folder / "checkpoints").glob("step-*")) else (SAME, CONTENT)
    before = identity(_read(folder), *kinds)
    now = identity(_plain(as_dict(config)), *kinds)
    open_ = {key for key in now if AUTO in (before[key], now[key])}
    if "train.per_device_train_batch_size" in open_:  # then what is accumulated is not counted alike
        open_.add("train.gradient_accumulation_steps")
    found = same.changed(_without(before, open_), _without(now, open_), config.checkpoint.allow_change)
    if found:
        raise ConfigError(
            f"output_dir: {folder} belongs to another configuration: {'; '.join(found)}: {same.REMEDY}"
        )


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _read(folder: Path) -> dict[str, Any]:
    """The configuration of an earlier start; what it does not say is at its default."""
    file = folder / CONFIG_FILE
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(_unreadable(file)) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(_unreadable(file))
    return DEFAULTS | dict(flat(content))


def _unreadable(file: Path) -> str:
    return (
        f"output_dir: {file} is not readable as a configuration; restore it, "
        "or set output_dir to another folder"
    )


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat, and without secrets, as what is on the disk."""
    return dict(flat(redact.tree(tree)))
