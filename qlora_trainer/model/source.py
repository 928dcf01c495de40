"""Where a model's files are: `builtin:…`, a folder, or the hub. Resolved before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_trainer.errors import MissingInputError

BUILTIN = "builtin:"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as save_pretrained names them


def resolve(name_or_path: str, revision: str | None = None) -> str:
    """Returns what transformers' `from_pretrained` takes: a folder, or a hub name that is reachable.

    Raises:
        MissingInputError: the folder does not exist or is not a model; the hub has no such model
            or cannot be reached and the model is not in the local cache.
    """
    if name_or_path.startswith(BUILTIN):
        from qlora_trainer.model import builtin

        return str(builtin.resolve(name_or_path))
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingInputError(
                f"model.model_name_or_path: {folder} is not a model folder (no config.json in it)"
            )
        return str(folder)
    # A hub name is `name` or `owner/name`; anything else that is not there was meant as a path.
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or folder.exists():
        raise MissingInputError(f"model.model_name_or_path: no model folder at {folder}")
    _hub_file(name_or_path, "config.json", revision)
    return name_or_path


def read_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The model's `config.json` as a dict, without loading anything else.

    Raises:
        MissingInputError: as `resolve`; or the file is not JSON.
    """
    source = resolve(name_or_path, revision)
    path = Path(source) / "config.json"
    if not path.is_file():
        path = Path(_hub_file(source, "config.json", revision))
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise MissingInputError(f"model.model_name_or_path: {path} is not JSON: {error}") from error
    return config


def weight_files(source: str, revision: str | None = None) -> dict[Path, list[str]] | None:
    """The safetensors files of a resolved model and the tensors that its index names in each.

    Those of a hub model are downloaded unless the local cache has them. None: the hub has it in no
    such form (transformers may know another).

    Raises:
        MissingInputError: a folder holds none, or its index is not one; the hub cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        found = _hub_weights(source, revision)
        if found is None:
            return None
        folder = found
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    if not (folder / INDEX).is_file():
        raise MissingInputError(
            f"model.model_name_or_path: {folder} has neither {SINGLE} nor {INDEX} and the shards it names; "
            "pickled weights are never read"
        )
    files: dict[Path, list[str]] = {}
    for name, file in _read_index(folder / INDEX).items():
        files.setdefault(folder / file, []).append(name)
    return dict(sorted(files.items()))


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it."""
    try:
        return {str(name): str(file) for name, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MissingInputError(
            f"model.model_name_or_path: {path}: not an index of shards ({error}); copy it again"
        ) from error


def _hub_weights(name: str, revision: str | None) -> Path | None:
    """The local folder of a hub model's weights after a download, if it has them as safetensors."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    for filename in (SINGLE, INDEX):
        try:
            with _hub_errors(name, revision, filename):
                path = Path(hf_hub_download(name, filename, revision=revision))
        except MissingInputError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                continue
            raise
        if filename == INDEX:
            shards = sorted(set(_read_index(path).values()))
            with _hub_errors(name, revision, "*.safetensors"):
                snapshot_download(name, revision=revision, allow_patterns=shards)
        return path.parent
    return None


def _hub_file(name: str, filename: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision, filename):
        return hf_hub_download(name, filename, revision=revision)


@contextmanager
def _hub_errors(name: str, revision: str | None, filename: str) -> Iterator[None]:
    """Turns what the hub says into one line and exit 66."""
    from httpx import HTTPError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model.model_name_or_path: {name}"
    try:
        yield
    except GatedRepoError as error:
        raise MissingInputError(f"{where} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise MissingInputError(f"{where} has no revision {revision}: check model.revision") from error
    except RepositoryNotFoundError as error:
        raise MissingInputError(
            f"{where}: no folder of that name and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise MissingInputError(f"{where} is neither a folder that exists nor a valid hub name") from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: the hub did not answer
        raise MissingInputError(
            f"{where}: no folder of that name here, not in the hub cache, and the hub cannot be reached: "
            "connect once to download it, or set model.model_name_or_path=/a/folder"
        ) from error
    except EntryNotFoundError as error:
        raise MissingInputError(f"{where} on the hub is not a model (no {filename})") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:  # HTTPError: a connection that broke
        raise MissingInputError(
            f"{where}: the hub cannot be reached ({type(error).__name__}): "
            "try again, or set model.model_name_or_path=/a/folder"
        ) from error
