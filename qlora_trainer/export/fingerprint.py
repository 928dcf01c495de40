"""Which base an adapter belongs to: a digest of the base's weights that takes well under a second.

It covers each weight file's safetensors header (every name, dtype, shape and offset), its size, and
sixteen samples of 64 KiB spread over it. Two revisions of a model differ in nearly every weight, so
samples tell them apart; a file with one flipped bit is not what this is for.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

_SAMPLES = 16
_BYTES = 1 << 16


def base_fingerprint(source: str, revision: str | None = None) -> str:
    """`sha256:…` of the base in folder or hub repository `source`; empty if it has no safetensors."""
    digest = hashlib.sha256()
    files = weight_files(source, revision)
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(struct.unpack("<Q", file.read(8))[0])
            digest.update(f"{path.name}:{size}".encode() + header)
            first = file.tell()
            for sample in range(_SAMPLES):
                file.seek(first + (size - first) * sample // _SAMPLES)
                digest.update(file.read(_BYTES))
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
