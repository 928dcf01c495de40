"""The quantized base, kept in the user's cache so that the next load need not quantize again.

In: where the 16-bit weights are and how they are to be quantized. Out: an ordinary bitsandbytes
checkpoint that `assemble` reads, every bit as it was, a quarter of the size (INT8: half).

An entry belongs to one source, one device type and one way to quantize; its record says of exactly
what it was made, and anything else is as good as nothing: the libraries' versions, config.json's
sha256, and of each weight file its resolved path, size, inode, modification and change times, and a
digest of samples spread over it. Hashing every byte would take as long as quantizing does. The change
time is the kernel's own: whoever writes into a file, renames another in its place or copies one with
its old date changes it; in the hub's cache a resolved path ends in the file's own hash besides.

    $XDG_CACHE_HOME/qlora_trainer/quantized/<name>-<key>/
      model/    the checkpoint, and in record.json what it was made of (`system.cache`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_trainer.model.shards import sample
from qlora_trainer.system import cache, disk, redact

LAYOUT = 1  # raise when what is kept, or how, changes
SHARD = "500MB"  # of the checkpoint; writing holds one of them in memory
RECORD = "record.json"


@dataclass(frozen=True)
class KeptBase:
    """A place in the cache, and what it must have been made of to be of use."""

    root: Path
    made_of: dict[str, Any]

    @classmethod
    def of(
        cls,
        source: str,
        files: Iterable[Path],
        quantization: BitsAndBytesConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KeptBase:
        """The place for `source`, whose weights are in `files` and its config.json beside them."""
        files = sorted(files)
        settings = {
            "source": str(Path(source).resolve()) if Path(source).is_dir() else source,
            "quantization": quantization.to_dict() | {"bnb_4bit_compute_dtype": None},  # set at each load
            "dtype": str(dtype),
            "device": device.type,  # a CPU and a GPU need not round alike
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        made_of = settings | {
            "layout": LAYOUT,
            "versions": {name: metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")},
            "config": hashlib.sha256((files[0].parent / "config.json").read_bytes()).hexdigest(),
            "files": [_identity(path.resolve()) for path in files],
        }
        name = redact.text(f"{Path(source).name}-{key}")
        return cls(cache.root() / "quantized" / name, redact.tree(made_of))

    @property
    def folder(self) -> Path:
        return self.root / "model"

    def ready(self, say: Callable[[str], None]) -> bool:
        """Whether the whole checkpoint is there, made of what it should be and every byte as it was written.

        Reading it takes as long as the disk does; loading finds it in memory then.
        """
        try:
            return cache.sealed(self.folder, RECORD) == {"made_of": self.made_of}
        except cache.DamagedError as error:
            say(f"the quantized base that was kept is made anew: {error}")
            return False

    def keep(self, model: PreTrainedModel) -> None:
        """Writes `model` there, whole or not at all. Another process that is at it is left to it.

        Raises:
            CheckpointError: no space, or the cache cannot be written.
        """

        def fill(work: Path) -> None:
            model.save_pretrained(work, max_shard_size=SHARD)
            cache.seal(work, RECORD, {"made_of": self.made_of})

        with disk.disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(self.root / ".lock", timeout=0):
                    disk.clean(self.root)  # what a killed process left
                    if not self.ready(lambda line: None):
                        disk.publish_folder(self.folder, fill, needed=_nbytes(model) + (1 << 20))
            except Timeout:
                return


def _nbytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _identity(path: Path) -> dict[str, Any]:
    status, digest = path.stat(), hashlib.sha256()
    sample(path, digest)
    return {
        "path": str(path),
        "bytes": status.st_size,
        "inode": status.st_ino,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
        "samples": digest.hexdigest(),
    }
