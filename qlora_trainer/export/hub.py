"""Exports to the hub, through `huggingface_hub`. The token is the user's own, from its usual places."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from qlora_trainer.errors import CheckpointError, ConfigError


def check(name: str) -> None:
    """Raises ConfigError unless `name` is `owner/name`."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(f"export.push_to_hub={name}: expected owner/name")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads every file of `folder` in one commit, making the repository if need be; returns its address.

    Raises:
        ConfigError: no token, or one that may not write there.
        CheckpointError: the hub cannot be reached or refuses; what is on disk stays.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name} export")
    except LocalTokenNotFoundError as error:
        raise ConfigError("export.push_to_hub: not logged in; run `hf auth login` or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ConfigError(
                f"export.push_to_hub={name}: the hub refuses this token ({status}); it needs "
                "write access there"
            ) from error
        raise CheckpointError(f"export.push_to_hub={name}: the hub answered {status}; try again") from error
    except (httpx.HTTPError, OSError) as error:
        raise CheckpointError(
            f"export.push_to_hub={name}: the hub cannot be reached ({type(error).__name__}); "
            f"the export is complete in {folder}"
        ) from error
    return f"{api.endpoint}/{name}"
