"""safetensors files written one tensor at a time: memory holds a tensor, never a shard.

The library's own writer wants every tensor of a file at once, which merging a 70B model on a small
host has to avoid. `model.shards` is the reader of the same kind.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from qlora_trainer.model.files import INDEX
from qlora_trainer.model.shards import NAMES, ShardReader
from qlora_trainer.system.disk import atomic_write, to_json


class ShardWriter:
    """Writes a file whose layout is known beforehand; tensors come in the layout's order."""

    def __init__(self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in layout.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = iter(layout.items())
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or next(self._expected, None) is None, "tensors are missing"

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends `tensor`, which must be the next of the layout."""
        expected = next(self._expected)
        assert expected == (name, (tuple(tensor.shape), tensor.dtype)), (
            f"{name} comes out of turn: {expected}"
        )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        view, written = raw.data, 0
        while written < len(view):
            written += self._file.write(view[written:])


def narrow(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a file, its float32 tensors as `dtype` and all others as they are."""
    reader = ShardReader(source)
    layout = {
        name: (slot.shape, dtype if slot.dtype == torch.float32 else slot.dtype)
        for name, slot in reader.slots.items()
    }
    with ShardWriter(target, layout) as writer:
        for name, (_, wanted) in layout.items():
            writer.write(name, reader.read(name).to(wanted))


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """The index that transformers reads when there are several files; file name -> its tensors."""
    if len(files) > 1:
        weight_map = dict(sorted((name, file) for file, names in files.items() for name in names))
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        atomic_write(folder / INDEX, to_json(index))
