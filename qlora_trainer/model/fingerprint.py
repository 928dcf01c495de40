"""Which base an adapter belongs to: a digest of the base's weights that takes well under a second.

It covers each weight file's safetensors header (every name, dtype, shape and offset), its size, and
samples spread over it: see `shards.sample`.
"""

from __future__ import annotations

import hashlib

from qlora_trainer.model.shards import open_files, sample
from qlora_trainer.model.source import weight_files


def base_fingerprint(source: str, revision: str | None = None) -> str:
    """`sha256:…` of a resolved model; empty if the hub has no safetensors of it.

    Raises:
        MissingInputError: as `source.weight_files`.
        CheckpointError: a file is damaged.
    """
    digest = hashlib.sha256()
    files = weight_files(source, revision)
    for reader in open_files(files or {}):
        sample(reader.path, digest)
    return f"sha256:{digest.hexdigest()}" if files else ""
