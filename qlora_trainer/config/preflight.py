"""What a configuration asks of this machine, asked before anything heavy is imported or loaded.

In: a checked `RunConfig`. Out: nothing, or the error that names what is missing: the model's files, the
data's files, a GPU. No torch: a wrong path ends the command in under a second.
"""

from __future__ import annotations

import ctypes
import os
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from qlora_trainer.config import checks, claim
from qlora_trainer.config.frozen import as_dict
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.options import DataOptions
from qlora_trainer.data.rows import supported
from qlora_trainer.data.scan import check_rows
from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.model import source
from qlora_trainer.system.disk import require_place


def check(config: RunConfig, command: str) -> None:
    """Raises the `QLoRAError` that says why `command` could not even begin here, or end; writes nothing."""
    if config.model.device == "cuda" and cuda_devices() == 0:
        raise ConfigError(
            "model.device: cuda is asked for and this machine shows no CUDA device; leave model.device out "
            "to use what is there, or see to the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
    if command == "train":
        claim.refuse(config)
        for product in ("checkpoints", "adapter"):  # what the run will publish there
            require_place(Path(config.output_dir or "") / product)
    if command in checks.NEEDS_DATA:
        check_data(config.data.path, "data.path")
        check_data(config.data.eval_path, "data.eval_path")
    name = config.model.model_name_or_path
    if name and not Path(name).exists() and not name.startswith(source.BUILTIN):
        stay_offline_if_the_hub_is_silent()
    if name and _is_looked_up(name, command):
        source.resolve(name, config.model.revision)
    if command in checks.NEEDS_DATA:
        check_rows(DataOptions(**as_dict(config.data)), config.seed)


def _is_looked_up(name: str, command: str) -> bool:
    """Whether `command` cannot begin without this model.

    A built-in one is converted on first use: that is loading. A finished run's, on the hub, is asked for
    when it is read: what is wrong with the run comes first.
    """
    if name.startswith(source.BUILTIN):
        return False
    is_path = name.startswith((".", "/", "~"))
    return command in checks.NEEDS_MODEL or (command in checks.NEEDS_RUN and is_path)


def stay_offline_if_the_hub_is_silent(timeout_seconds: float = 5.0) -> None:
    """Set `HF_HUB_OFFLINE`, as a user without network would, if the hub does not answer.

    The hub's client otherwise tries each file six times, 25 s apiece, even files in its cache. It reads the
    variable when it is imported, which no module does before this.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=timeout_seconds).close()
    except HTTPError:
        return  # an answer, if not a friendly one
    except (OSError, HTTPException):
        os.environ["HF_HUB_OFFLINE"] = "1"


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
        plainly_a_file = entry.startswith((".", "/", "~")) or supported(file) or entry.count("/") > 1
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
