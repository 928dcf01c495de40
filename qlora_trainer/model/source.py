"""Where a model's files are: `builtin:…`, a folder, or the hub. Resolved before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_trainer.errors import MissingInputError
from qlora_trainer.model.files import (
    CONFIG,
    INDEX,
    KEY,
    SINGLE,
    check_generation_config,
    read_config_file,
    read_index,
    refuse_links_out,
    weights_in,
)
from qlora_trainer.system.redact import require_whole

BUILTIN = "builtin:"


def resolve(name_or_path: str, revision: str | None = None) -> str:
    """Returns what transformers' `from_pretrained` takes: a folder's absolute path, or a reachable hub name.

    Raises:
        ConfigError: the name is what a file has of one that held a secret.
        MissingInputError: the folder does not exist or is not a model, or `files` refuses what is in it;
            the hub has no such model or cannot be reached and the model is not in the local cache.
        ConfigError: it is what a file has of a path that held a secret.
    """
    require_whole(name_or_path, KEY)
    if name_or_path.startswith(BUILTIN):
        from qlora_trainer.model import builtin

        return str(builtin.resolve(name_or_path))
    folder = Path(name_or_path).expanduser().absolute()  # what is recorded must hold from any working folder
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise MissingInputError(f"{KEY}: {folder} is not a model folder (no {CONFIG} in it)")
        refuse_links_out(folder)
        read_config_file(folder / CONFIG)
        check_generation_config(folder)
        return str(folder)
    # A hub name is `name` or `owner/name`; anything else that is not there was meant as a path.
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or folder.exists():
        raise MissingInputError(f"{KEY}: no model folder at {folder}; set it to where the model is now")
    read_config_file(Path(_hub_file(name_or_path, CONFIG, revision)))
    return name_or_path


def read_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The model's `config.json` as a dict, without loading anything else.

    Raises:
        MissingInputError: as `resolve`; or the file is not JSON.
    """
    return read_config_file(folder_of(resolve(name_or_path, revision), revision) / CONFIG)


def folder_of(source: str, revision: str | None = None) -> Path:
    """The folder of a resolved model, which for one of the hub is in the hub's cache.

    Raises:
        MissingInputError: as `resolve`.
    """
    folder = Path(source)
    return folder if folder.is_dir() else Path(_hub_file(source, CONFIG, revision)).parent


def weight_files(source: str, revision: str | None = None) -> dict[Path, list[str]] | None:
    """The weight files of a resolved model, as `files.weights_in` lists them.

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
    files = weights_in(folder)
    if not files:
        there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise MissingInputError(
            f"{KEY}: {folder} has neither {SINGLE} nor {INDEX} and the shards it names"
            f"{f' (there is {there}: copy the index too)' if there else ''}; pickled weights are never read"
        )
    return files


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
            shards = sorted(set(read_index(path).values()))
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

    where = f"{KEY}: {name}"
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
