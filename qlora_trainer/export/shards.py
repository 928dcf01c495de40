"""safetensors files one tensor at a time: memory holds a tensor, never a shard.

The format is eight bytes of header length, a JSON header, then raw bytes
(https://github.com/huggingface/safetensors#format). The library's own writer wants every tensor of
a file at once and its reader maps the file, whose pages count as the process's memory; both are
what merging a 70B model on a small host has to avoid.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from qlora_trainer.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """One tensor's place: shape, dtype, and bytes [start, stop) of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class ShardReader:
    """The tensors of one file, read when asked for.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(length))
            first, size = 8 + length, path.stat().st_size
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); copy it again"
            ) from error
        self.slots: dict[str, Slot] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} is stored as {entry['dtype']}, which is not known here"
                )
            start, stop = (first + offset for offset in entry["data_offsets"])
            if stop > size:
                raise CheckpointError(f"{path}: cut short at {size:,} bytes of {stop:,}; copy it again")
            self.slots[name] = Slot(tuple(entry["shape"]), DTYPES[entry["dtype"]], start, stop)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in memory of its own."""
        slot = self.slots[name]
        if not slot.nbytes:
            return torch.empty(slot.shape, dtype=slot.dtype)
        buffer = bytearray(slot.nbytes)
        with self.path.open("rb", buffering=0) as file:
            file.seek(slot.start)
            view, got = memoryview(buffer), 0
            while got < slot.nbytes:  # one call reads at most 2 GiB
                part = file.readinto(view[got:])
                if not part:
                    raise CheckpointError(f"{self.path}: cut short while reading {name}; copy it again")
                got += part
        return torch.frombuffer(buffer, dtype=slot.dtype).view(slot.shape)


class ShardWriter:
    """Writes a file whose layout is known beforehand; tensors come in the layout's order."""

    def __init__(self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in layout.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
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


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """The index that transformers reads when there are several files; file name -> its tensors."""
    if len(files) > 1:
        weight_map = dict(sorted((name, file) for file, names in files.items() for name in names))
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_all(paths: list[Path]) -> Iterator[tuple[ShardReader, str]]:
    """Every tensor of several files: (its file, its name)."""
    for path in paths:
        reader = ShardReader(path)
        for name in reader.slots:
            yield reader, name
