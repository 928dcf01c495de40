"""safetensors files one tensor at a time: memory holds a tensor, never a shard.

In: paths. Out: tensors, read when asked for, on the CPU or straight onto a GPU.

The format is eight bytes of header length, a JSON header, then raw bytes
(https://github.com/huggingface/safetensors#format). The library's own reader maps its files: every
page it has touched counts as the process's memory until the last tensor is loaded (an 0.8 GB model
quantized from eight shards peaked 1.1 GB above its start), and a file that is cut short under a map
kills the process without a word. Here a damaged file is one line.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import EllipsisType
from typing import IO, Any

import torch
from torch import Tensor

from qlora_trainer.errors import CheckpointError
from qlora_trainer.system.untrusted import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CPU = torch.device("cpu")
_STAGING = 16 << 20  # bytes of page-locked memory that a file passes through on its way to a GPU
_LARGE = 1 << 20  # bytes from which a tensor is worth giving freed memory back first
_SAMPLES, _SAMPLE = 16, 1 << 16  # of a file; bytes
_thread = threading.local()  # transformers reads with several threads


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
                size = path.stat().st_size
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                header: dict[str, Any] = dict(parse_json(file.read(length)))
            header.pop("__metadata__", None)
            self.slots = {name: _slot(name, entry, 8 + length) for name, entry in header.items()}
        except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({error}); copy it again"
            ) from error
        end = max((slot.stop for slot in self.slots.values()), default=0)
        if end > size:
            raise CheckpointError(f"{path}: cut short at {size:,} bytes of {end:,}; copy it again")

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """A tensor in memory of its own, on `device`.

        Raises:
            CheckpointError: the file has been cut or removed meanwhile.
        """
        slot = self.slots[name]
        tensor = torch.empty(slot.shape, dtype=slot.dtype, device=device)
        if not slot.nbytes:
            return tensor
        raw = tensor.reshape(-1).view(torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(slot.start)
                if device.type == "cpu":
                    self._fill(raw, file, name)
                else:
                    self._fill_through(_staging(), raw, file, name)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return tensor

    def _fill_through(self, staging: Tensor, raw: Tensor, file: IO[bytes], name: str) -> None:
        for part in raw.split(len(staging)):
            self._fill(staging[: len(part)], file, name)
            part.copy_(staging[: len(part)])  # waits for the device: the next part takes the same place

    def _fill(self, raw: Tensor, file: IO[bytes], name: str) -> None:
        view, got = raw.numpy().data, 0
        while got < len(view):  # one call reads at most 2 GiB
            part = file.readinto(view[got:])  # type: ignore[attr-defined]  # unbuffered: a RawIOBase
            if not part:
                raise CheckpointError(f"{self.path}: cut short while reading {name}; copy it again")
            got += part


def _slot(name: str, entry: dict[str, Any], first: int) -> Slot:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}, which is not known here")
    start, stop = (first + offset for offset in entry["data_offsets"])
    slot = Slot(tuple(entry["shape"]), DTYPES[entry["dtype"]], start, stop)
    if start < first or slot.nbytes != math.prod(slot.shape) * slot.dtype.itemsize:
        raise ValueError(f"{name} has {slot.nbytes:,} bytes and shape {list(slot.shape)}")
    return slot


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint as `from_pretrained(state_dict=…)` takes it: read when `[...]` asks for it.

    It has the methods of the slices of safetensors' own reader that transformers uses.
    """

    reader: ShardReader
    name: str
    device: torch.device

    def get_dtype(self) -> str:
        return NAMES[self.reader.slots[self.name].dtype]

    def get_shape(self) -> list[int]:
        return list(self.reader.slots[self.name].shape)

    def __getitem__(self, index: EllipsisType) -> Tensor:
        assert index is ..., "a tensor is read whole"
        if self.device.type == "cpu" and self.reader.slots[self.name].nbytes >= _LARGE:
            release_freed()
        return self.reader.read(self.name, self.device)


def open_files(files: Mapping[Path, Sequence[str]]) -> list[ShardReader]:
    """A reader for each of a checkpoint's files, in their order; only headers are read.

    Args:
        files: each file and the tensors that an index says it holds, if there is one.

    Raises:
        CheckpointError: a file is missing or damaged, lacks a tensor that the index names, or holds one
            that another holds too.
    """
    readers: list[ShardReader] = []
    holder: dict[str, Path] = {}
    for path, named in files.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: the index names this file and it is not there; copy it again")
        reader = ShardReader(path)
        absent = [name for name in named if name not in reader.slots]
        if absent:
            raise CheckpointError(
                f"{path}: the index names {absent[0]} in it"
                f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, which it does not hold; "
                "copy the shards and their index again"
            )
        for name in reader.slots:
            if name in holder:
                raise CheckpointError(
                    f"{path}: {name} is in it and in {holder[name].name}, and which of the two is meant "
                    "cannot be known; copy the shards and their index again"
                )
            holder[name] = path
        readers.append(reader)
    return readers


def stored_tensors(files: Mapping[Path, Sequence[str]], device: torch.device) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's files, unread; see `open_files`.

    Args:
        device: where they are read to.
    """
    return {name: StoredTensor(reader, name, device) for reader in open_files(files) for name in reader.slots}


def sample(path: Path, digest: hashlib._Hash) -> None:
    """Feeds `digest` a file's name, size, header, and 16 samples of 64 KiB spread over it.

    Two revisions of a model differ in nearly every weight, so that samples tell them apart; a file with
    one flipped bit is not what this is for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(struct.unpack("<Q", file.read(8))[0])
        digest.update(f"{path.name}:{size}".encode() + header)
        first = file.tell()
        for number in range(_SAMPLES):
            file.seek(first + (size - first) * number // _SAMPLES)
            digest.update(file.read(_SAMPLE))


def release_freed() -> None:
    """Gives memory that was freed back to the system, if this is glibc.

    Its allocator keeps what a quantizer freed as holes between the weights that stay: in float32 an
    0.8 GB model came to 2.4 GB, 0.2 of it the model.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _staging() -> Tensor:
    """This thread's page-locked buffer, uint8 [_STAGING]."""
    if not hasattr(_thread, "staging"):
        _thread.staging = torch.empty(_STAGING, dtype=torch.uint8, pin_memory=True)
    staging: Tensor = _thread.staging
    return staging
