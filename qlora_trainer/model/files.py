"""The files of a model folder: which hold its weights, what config.json says, and that none leads elsewhere.

In: a folder. Out: the one list of weight files that loading, planning, the fingerprint, merging and the
cache go by, in the order of transformers: `model.safetensors`, else the shards that
`model.safetensors.index.json` names. Whatever else lies beside them (a release's own
`consolidated.safetensors`, shards of an older save, an adapter) is nobody's. Torch is not imported.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.errors import MissingInputError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as save_pretrained names them
KEY = "model.model_name_or_path"

# A config.json with sizes that no model has makes libraries build for ever. Of what they make one by one
# there may be this many, or as many as the files hold tensors.
COUNTS = {"layer": 1024, "expert": 1 << 16, "num_labels": 1 << 16}
LARGEST = 1 << 24  # of a side: rows of an embedding, width of a layer, heads
_SIDE = re.compile(r"size|dim|d_model|embd|inner|heads|width|rank|channels|state|hidden|vocab")


def weights_in(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files that are the model's, and the tensors that its index names in each.

    Empty if the folder holds none.

    Raises:
        MissingInputError: an index that is damaged or names anything but files of its folder.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    if not (folder / INDEX).is_file():
        return {}
    files: dict[Path, list[str]] = {}
    for name, file in read_index(folder / INDEX).items():
        files.setdefault(folder / file, []).append(name)
    return dict(sorted(files.items()))


def strays(folder: Path) -> list[str]:
    """Names of the safetensors files beside the model's own, if it has any; they are not read."""
    own = {path.name for path in weights_in(folder)}
    return sorted(path.name for path in folder.glob("*.safetensors") if own and path.name not in own)


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it.

    Raises:
        MissingInputError: it is not an index, or names a file elsewhere, or one that is no safetensors file.
    """
    try:
        index = json.loads(path.read_bytes())["weight_map"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MissingInputError(f"{KEY}: {path}: not an index of shards ({error}); copy it again") from error
    files = {str(name): str(file) for name, file in index}
    for file in sorted(set(files.values())):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise MissingInputError(
                f"{KEY}: {path} names {file!r}: an index names .safetensors files of its own folder, "
                "and nothing else is read"
            )
    return files


def refuse_links_out(folder: Path) -> None:
    """No file of the folder may be a link to one elsewhere, or a stranger's folder could name any of ours.

    The hub's cache is made of links, from `snapshots/` to `blobs/` beside it or in the store that several
    models share; those are followed.

    Raises:
        MissingInputError: naming the link and where it leads.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        allowed += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or path.is_dir():
            continue
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise MissingInputError(
                f"{KEY}: {path} is a link to {target}, which is outside the model's folder: "
                "put the file itself there"
            )


def read_config_file(path: Path) -> dict[str, Any]:
    """A `config.json` as a dict.

    Raises:
        MissingInputError: it is not JSON, or asks for sizes that the weights beside it cannot have.
    """
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise MissingInputError(f"{KEY}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MissingInputError(f"{KEY}: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MissingInputError(f"{KEY}: {path} is not a JSON object; copy it again")
    for key, number in _numbers(config):
        most = next((most for word, most in COUNTS.items() if word in key), None)
        if most is not None and number > most and number > (held := _tensors(path.parent)):
            beside = f", and the weights beside it are {held:,} tensors" * (held > 0)
            raise MissingInputError(
                f"{KEY}: {path}: {key}={_shown(number)}{beside}: no model has that; copy it again"
            )
        if _SIDE.search(key) and number > LARGEST:
            raise MissingInputError(
                f"{KEY}: {path}: {key}={_shown(number)}: no model has that; copy it again"
            )
    return config


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in a config and in the configs inside it, with its key."""
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), value


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number < 1e15 else "more than 10^15"


def _tensors(folder: Path) -> int:
    """How many tensors the weight files hold, as the index or a file's header has it; 0 if there are none."""
    files = weights_in(folder)
    if (folder / SINGLE) not in files:
        return sum(map(len, files.values()))
    try:
        with (folder / SINGLE).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, (folder / SINGLE).stat().st_size)))
        return len(header.keys() - {"__metadata__"})
    except (OSError, ValueError, AttributeError, RecursionError, struct.error):
        return 0  # loading says what is wrong with it
