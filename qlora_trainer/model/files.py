"""The files of a model folder: which hold its weights, what config.json says, and that none leads elsewhere.

In: a folder. Out: the one list of weight files that loading, planning, the fingerprint, merging and the
cache go by, in the order of transformers: `model.safetensors`, else the shards that
`model.safetensors.index.json` names. Whatever else lies beside them (a release's own
`consolidated.safetensors`, shards of an older save, an adapter) is nobody's. Torch is not imported.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.errors import MissingInputError
from qlora_trainer.system.untrusted import parse_json, read_object

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as save_pretrained names them
KEY = "model.model_name_or_path"

# A config.json with sizes that no model has makes libraries build for ever. Of what they make one by one
# there may be this many, or as many as the files hold tensors.
COUNTS = {"layer": 1024, "expert": 1 << 16, "num_labels": 1 << 16}
LARGEST = 1 << 24  # of a side: rows of an embedding, width of a layer, heads
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_SIDE = re.compile(r"size|dim|d_model|embd|inner|heads|width|rank|channels|state|hidden|vocab")
_LONG_NUMBER = re.compile(rb'"(?!max_length|stride)[^"]{0,500}":\s*(\d{8,})')


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
        index = parse_json(path.read_bytes())["weight_map"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
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
        MissingInputError: it is not JSON, names code on the hub, or asks for sizes that the weights beside it
            cannot have.
    """
    config = _read_object(path)
    for key, number in _leaves(config):
        if key.endswith("attn_implementation") and "/" in str(number):
            raise MissingInputError(
                f"{KEY}: {path}: {key}={number} is a kernel of the hub: no code is run that a model brings; "
                "take it out and choose model.attn_implementation"
            )
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if key in LAYERS and number < 1:
            raise MissingInputError(f"{KEY}: {path}: {key}={_shown(number)}; a model has one or more")
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


def check_generation_config(folder: Path) -> None:
    """Raises MissingInputError for a generation_config.json whose stop tokens are none, if there is one."""
    path = folder / GENERATION
    if not path.is_file():
        return
    stops = _read_object(path).get("eos_token_id")
    for token in stops if isinstance(stops, list) else [stops]:
        if token is not None and (not isinstance(token, int) or not 0 <= token < LARGEST):
            raise MissingInputError(f"{KEY}: {path}: eos_token_id={token!r:.40} is no token; copy it again")


def check_tokenizer(folder: Path) -> None:
    """Raises MissingInputError for a tokenizer.json with token ids that no vocabulary has, if there is one.

    Libraries make room for every id up to the largest. Looked for as text: parsing takes half a second.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    for found in _LONG_NUMBER.finditer(path.read_bytes()):
        if int(found[1][:20]) > LARGEST:
            raise MissingInputError(
                f"{KEY}: {path}: a token has the id {found[1][:20].decode()}: no vocabulary is that large"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        raise MissingInputError(f"{KEY}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MissingInputError(f"{KEY}: {path} is {error}; copy it again") from error


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value in a config and in the configs inside it that is no object, with its key."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        outer, inner = waiting.pop()
        for key, value in inner.items():
            # `attn_implementation` may be an object: for each part of a model
            name = outer if outer.endswith("attn_implementation") else str(key)
            if isinstance(value, Mapping):
                waiting.append((name, value))
            else:
                yield name, value


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
            header = parse_json(file.read(min(length, (folder / SINGLE).stat().st_size)))
        return len(header.keys() - {"__metadata__"})
    except (OSError, ValueError, AttributeError, struct.error):
        return 0  # loading says what is wrong with it
