"""What a checkpoint is: a folder of safetensors and JSON with a manifest that proves it whole.

    step-000200/
      adapter_model.safetensors   a valid PEFT adapter together with
      adapter_config.json         this one
      optimizer.safetensors       float32 masters and moments, by parameter name
      rng.safetensors             random number generator states (`rng`), one set a rank
      state.json                  step, data position, scheduler, identity of the run, versions …
      manifest.json               format version, and size and sha256 of every file above

In: tensors and plain dictionaries (`write`). Out: a `Checkpoint` (`read`), or the list of what is
wrong with a folder (`verify`). Nothing in here is atomic: `publish` makes it so.

The manifest is written in one canonical way and holds its own digest, so that `verify` notices any
changed byte of any file, its own included. Names in it are plain: no folder, no link, and only the
two kinds of file that cannot run code when read.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import redact
from qlora_trainer.system.disk import to_json

VERSION = 1
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
REQUIRED = frozenset({ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG, STATE})

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")
_FOLDER_NAME = re.compile(r"step-(\d{6,})")
_BLOCK = 1 << 20  # bytes read at a time while hashing


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose every file has been verified; tensors are read when asked for."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were finished when it was saved."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of one of its safetensors files, on the CPU."""
        try:
            return load_file(self.folder / name, device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.folder / name}: {error}") from error

    def document(self, name: str) -> dict[str, Any]:
        """One of its JSON files."""
        try:
            return _parse((self.folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.folder / name}: {error}") from error


def folder_name(step: int) -> str:
    """`step-000200`."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name promises; None if it is not a checkpoint's name."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def size_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes on disk of a checkpoint with these files, rounded up by 1 MiB for headers and JSON."""
    return (1 << 20) + sum(tensor.nbytes for file in tensors.values() for tensor in file.values())


def write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes the files into an existing empty folder, then the manifest over them.

    Args:
        tensors: file name -> tensors by name, on any device; views of one buffer may be given as
            long as they do not overlap.
        documents: file name -> what JSON can hold. `state.json` has at least `step`.
    """
    missing = REQUIRED - tensors.keys() - documents.keys()
    assert not missing, f"a checkpoint without {sorted(missing)}"
    assert "step" in documents[STATE]
    for name, file in tensors.items():
        contiguous = {key: tensor.detach().contiguous() for key, tensor in file.items()}
        # PEFT and transformers read `format` to know which library's tensors these are.
        save_file(contiguous, folder / name, metadata={"format": "pt"})
    for name, document in documents.items():
        (folder / name).write_bytes(to_json(redact.tree(document)))
    files = {name: _measure(folder / name) for name in sorted([*tensors, *documents])}
    (folder / MANIFEST).write_bytes(_manifest(files))


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty if every byte is as written."""
    if folder.is_symlink() or not folder.is_dir():
        return ["not a folder"]
    try:
        files = _read_manifest(folder / MANIFEST)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {_reason(error)}"]
    problems = [f"{name}: not in the manifest" for name in sorted(REQUIRED - files.keys())]
    for name, expected in files.items():
        try:
            found = _measure(folder / name)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {_reason(error)}")
            continue
        if found["size"] != expected["size"]:
            problems.append(f"{name}: {found['size']} bytes instead of {expected['size']}")
        elif found != expected:
            problems.append(f"{name}: its sha256 is not the manifest's")
    return problems


def read(folder: Path) -> Checkpoint:
    """The verified checkpoint in `folder`.

    Raises:
        CheckpointError: naming everything that `verify` finds.
    """
    problems = verify(folder)
    if problems:
        raise CheckpointError(f"checkpoint {folder} is corrupt: {'; '.join(problems)}")
    checkpoint = Checkpoint(folder, _parse((folder / STATE).read_bytes()))
    promised = step_of(folder)
    if promised is not None and promised != checkpoint.step:
        raise CheckpointError(f"checkpoint {folder} holds step {checkpoint.step}: it was renamed")
    return checkpoint


def _measure(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a regular file; a link or anything else is a `ValueError`."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a regular file")
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "size": size}


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    body = {"format_version": VERSION, "files": files}
    return to_json({**body, "sha256": hashlib.sha256(to_json(body)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a regular file")
    data = path.read_bytes()
    document = _parse(data)
    version, files = document.get("format_version"), document.get("files")
    if not isinstance(version, int) or not isinstance(files, dict):
        raise ValueError("not a checkpoint's manifest")
    if version > VERSION:
        raise ValueError(f"format version {version}, this program reads up to {VERSION}")
    if _manifest(files) != data:
        raise ValueError("changed since it was written")
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"names the file {name!r}; only plain .safetensors and .json names are read")
    return files


def _parse(data: bytes) -> dict[str, Any]:
    """A JSON object, or `ValueError` (undecodable text and deep nesting included)."""
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
