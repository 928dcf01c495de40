"""A run's folder belongs to one configuration: claimed at the start, refused to any other.

In: a `RunConfig`. Out: the folder, made and writable, with the run's `config.yaml` in it. Which settings may
change between a start and its resumption is for `checkpoint/` to judge; here only what makes it another run:
another recipe, model or data set.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qlora_trainer.config.load import to_yaml
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.watch import as_dict
from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.system.redact import Redactor

IDENTITY = (
    "recipe",
    "model.model_name_or_path",
    "model.revision",
    "data.path",
    "data.name",
    "data.split",
    "data.revision",
)
CONFIG_FILE = "config.yaml"
WRITTEN_BEFORE = {"plan.json", "inspect.html", "bench.json"}  # by commands that look first
WORTH_KEEPING = ("checkpoints", "metrics.jsonl", "adapter", "exports")


def claim_output_dir(config: RunConfig, required_bytes: int = 64 * 2**20) -> Path:
    """Make `output_dir` this run's own and write `config.yaml` into it; returns the folder.

    `required_bytes` is what the run will write there (the plan knows). One process calls it (rank 0).

    Raises `ConfigError` if the folder holds a run of another recipe, model or data set, or files that are no
    run's; `CheckpointError` if it cannot be written to or the disk is too small.
    """
    assert config.output_dir, "checks.missing lets no training run pass without an output_dir"
    folder = Path(config.output_dir)
    refuse_foreign(config)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < required_bytes:
            if made:
                folder.rmdir()
            raise CheckpointError(
                f"output_dir: {folder} has {free / 2**30:.1f} GiB free and the run needs "
                f"{required_bytes / 2**30:.1f} GiB; make room or set output_dir=/another/disk"
            )
        _write(folder / CONFIG_FILE, to_yaml(config))
    except OSError as error:
        raise CheckpointError(
            f"output_dir: {folder} {_reason(error)}; set output_dir=/a/writable/folder"
        ) from error
    return folder


def refuse_foreign(config: RunConfig) -> None:
    """The part of the claim that only looks, without torch and before anything is made.

    Raises `ConfigError` if `output_dir` is not this run's, `CheckpointError` if it cannot be made there.
    """
    folder = Path(config.output_dir or "")
    remedy = f"set output_dir to another folder, or remove {folder}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is a file"
        raise CheckpointError(
            f"output_dir: {folder} cannot be made, {there} {reason}; set output_dir=/elsewhere"
        )
    file = folder / CONFIG_FILE
    if not file.is_file():
        entries = folder.iterdir() if folder.is_dir() else ()
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
        strangers = sorted(names - WRITTEN_BEFORE)
        if strangers:
            raise ConfigError(
                f"output_dir: {folder} holds {strangers[0]} and no {CONFIG_FILE}, so it is no run's; {remedy}"
            )
        return
    if not any((folder / name).exists() for name in WORTH_KEEPING):
        return  # a start that failed before its first step has nothing to protect
    try:
        previous = OmegaConf.load(file)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"output_dir: {file} is not readable as a configuration; {remedy}") from error
    mine = OmegaConf.create(as_dict(config))
    redactor = Redactor()  # what is on the disk has no secrets in it
    for key in IDENTITY:
        before, now = (redactor.tree(_plain(OmegaConf.select(side, key))) for side in (previous, mine))
        if before != now:
            raise ConfigError(
                f"output_dir: {folder} belongs to another configuration ({key} was {before}, is {now}); "
                f"{remedy}"
            )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _write(file: Path, text: str) -> None:
    """Whole or not at all: a run killed here leaves the old file or the new one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def _reason(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "cannot be written to (no permission)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "is on a full disk"
    return f"cannot be made ({error.strerror})"
