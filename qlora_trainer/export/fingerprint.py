"""Which base an adapter belongs to: a digest of the base's weights that takes well under a second.

It covers each weight file's safetensors header (every name, dtype, shape and offset), its size, and
samples spread over it: see `model.shards.sample`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qlora_trainer.model.shards import sample


def base_fingerprint(source: str, revision: str | None = None) -> str:
    """`sha256:…` of the base in folder or hub repository `source`; empty if it has no safetensors."""
    digest = hashlib.sha256()
    files = weight_files(source, revision)
    for path in files:
        sample(path, digest)
    return f"sha256:{digest.hexdigest()}" if files else ""


def weight_files(source: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model folder or of a hub model in the local cache, in order of name."""
    return sorted(model_folder(source, revision).glob("*.safetensors"))


def model_folder(source: str, revision: str | None = None) -> Path:
    """`source` itself, or the folder of the local cache that holds the hub model's config."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    found = cached_file(source, "config.json", revision=revision)
    assert found is not None  # cached_file raises unless told otherwise
    return Path(found).parent


def sha256(path: Path) -> str:
    """Hex digest of a file (`hashlib.file_digest` needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
