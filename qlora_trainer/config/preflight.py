"""What a configuration asks of this machine, asked before anything heavy is imported or loaded.

In: a checked `RunConfig`. Out: nothing, or the error that names what is missing: the model's files, the
data's files, a GPU. No torch: a wrong path ends the command in under a second.
"""

from __future__ import annotations

import ctypes
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlora_trainer.config import checks
from qlora_trainer.config.claim import refuse_foreign
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.watch import plain
from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.model import source

DATA_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".arrow",
)


def check(config: RunConfig, command: str) -> None:
    """Raises `MissingInputError` or `ConfigError` if `command` could not even begin here."""
    config = plain(config)
    if config.model.device == "cuda" and cuda_devices() == 0:
        raise ConfigError(
            "model.device: cuda is asked for and this machine shows no CUDA device; leave model.device out "
            "to use what is there, or see to the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
    if command == "train":
        refuse_foreign(config)
    if command in checks.NEEDS_DATA:
        check_data(config.data.path, "data.path")
        check_data(config.data.eval_path, "data.eval_path")
    if command in checks.NEEDS_MODEL and config.model.model_name_or_path:
        name = config.model.model_name_or_path
        if not name.startswith(source.BUILTIN):  # those convert on first use, which is loading
            source.resolve(name, config.model.revision)


def check_data(path: Any, key: str) -> None:
    """Raises `MissingInputError` if `path` (a source, or a list of them) is plainly a file and not there.

    What is neither there nor plainly a file may be a dataset of the hub: the data room finds out.
    """
    for entry in path if isinstance(path, list) else [path]:
        if isinstance(entry, dict):
            check_data(entry.get("path"), key)
            continue
        if entry is None or ":" in entry.partition("/")[0]:
            continue
        file = Path(entry).expanduser()
        plainly_a_file = (
            entry.startswith((".", "/", "~")) or file.suffix in DATA_SUFFIXES or entry.count("/") > 1
        )
        if plainly_a_file and not any(character in entry for character in "*?[") and not file.exists():
            raise MissingInputError(f"{key}: {entry} does not exist; {_beside(file)}")


def _beside(file: Path) -> str:
    if not file.parent.is_dir():
        return f"nor does the folder {file.parent}: check the path"
    near = get_close_matches(file.name, (other.name for other in file.parent.iterdir()), n=1, cutoff=0.5)
    return f"did you mean {file.parent / near[0]}?" if near else f"{file.parent} holds nothing of a like name"


def cuda_devices() -> int:
    """CUDA devices that this process may use, asked of the driver itself (`cuDeviceGetCount`)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
