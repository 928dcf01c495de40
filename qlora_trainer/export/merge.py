"""The adapter written into the weights, shard by shard: the model that was trained, as one model.

In: an adapter folder and its base. Out: an ordinary model folder. Memory holds one weight in float32,
its update and the adapter, whatever the size of the model; arithmetic is float32 and each weight is
rounded once, to the dtype it is stored in. Merging into a 4-bit model and quantizing again, as
PEFT's `merge_and_unload` does there, rounds the update away (0.4% of a weight's norm): never done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.base import Base
from qlora_trainer.export.delta import Updates
from qlora_trainer.export.shards import ShardWriter, write_index
from qlora_trainer.model.files import SINGLE
from qlora_trainer.model.shards import ShardReader
from qlora_trainer.system.disk import write_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Piece:
    """One tensor to write: where it comes from and under which name it goes."""

    shard: Path
    stored: str
    parameter: str
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """A base and what an adapter changes in it, checked to fit.

    Attributes:
        dtype: of the floating-point tensors that are written.
        untied: input and output embeddings differ after the update, though the base shares them.
    """

    base: Base
    updates: Updates
    dtype: torch.dtype
    untied: bool
    pieces: tuple[Piece, ...]

    @classmethod
    def plan(cls, base: Base, updates: Updates, dtype: torch.dtype | None = None) -> Merge:
        """Looks at headers only.

        Raises:
            CheckpointError: the adapter belongs to another base, or the base lacks a tensor.
            ConfigError: embeddings that were resized apart from each other.
        """
        updates.check(base.parameters, base.embeddings, base.source)
        untied = any(updates.touches(name) for pair in base.tied.items() for name in pair)
        pieces: list[Piece] = []
        for reader in base.readers:
            for stored, parameter in base.contents(reader):
                if parameter in base.tied:
                    continue  # a copy of what is shared; written below where it has become its own
                pieces.append(_piece(reader.path, stored, parameter, stored, base, updates))
                for twin, same in base.tied.items():
                    if untied and same == parameter:
                        pieces.append(_piece(reader.path, stored, twin, twin, base, updates))
        merge = cls(base, updates, dtype or base.dtype(), untied, tuple(pieces))
        merge._check_complete()
        return merge

    @property
    def nbytes(self) -> int:
        """Size of the weights to be written."""
        return sum(torch.Size(piece.shape).numel() for piece in self.pieces) * self.dtype.itemsize

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings, which resizing changes."""
        (rows,) = {piece.shape[0] for piece in self.pieces if piece.parameter in self.base.embeddings}
        return rows

    def value(self, piece: Piece, reader: ShardReader) -> Tensor:
        """The tuned weight, in float32."""
        # A weight that has become its own still starts from the one it shared.
        source = self.base.tied.get(piece.parameter, piece.parameter)
        return self.updates.apply(piece.parameter, self.base.value(reader, piece.stored, source))

    def by_shard(self) -> Iterator[tuple[str, ShardReader, list[Piece]]]:
        """File name, its reader and what to write into the file of that name."""
        shares = [
            (reader, [p for p in self.pieces if p.shard == reader.path]) for reader in self.base.readers
        ]
        shares = [(reader, pieces) for reader, pieces in shares if pieces]
        for reader, pieces in shares:  # one file alone is found by its name, several by their index
            yield reader.path.name if len(shares) > 1 else SINGLE, reader, pieces

    def write(self, folder: Path, progress: Progress | None = None) -> None:
        """Weights, index and config of the merged model into an existing folder."""
        files: dict[str, list[str]] = {}
        done = 0
        for name, reader, pieces in self.by_shard():
            files[name] = [piece.name for piece in pieces]
            with ShardWriter(folder / name, {p.name: (p.shape, self.dtype) for p in pieces}) as writer:
                for piece in pieces:
                    value = self.value(piece, reader).to(self.dtype)
                    writer.write(piece.name, value)
                    done += value.nbytes
                    if progress is not None:
                        progress(done, self.nbytes)
        write_index(folder, files, self.nbytes)
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        """The base's config with what merging changes in it."""
        config = json.loads((self.base.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)  # the older name of `dtype`
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.untied:
            config["tie_word_embeddings"] = False
        if "vocab_size" in config:
            config["vocab_size"] = self.vocab_size
        write_json(folder / "config.json", config)

    def _check_complete(self) -> None:
        written = {piece.parameter for piece in self.pieces}
        expected = {name for name in self.base.parameters if name not in self.base.tied}
        lost = sorted(expected - written)
        if lost:
            raise CheckpointError(
                f"{self.base.source}: {lost[0]} is in none of its files; copy the model again"
            )
        rows = {piece.shape[0] for piece in self.pieces if piece.parameter in self.base.embeddings}
        if len(rows) > 1:
            sizes = " and ".join(map(str, sorted(rows)))
            raise ConfigError(
                f"the adapter resizes one embedding and not the other ({sizes} rows): "
                "save both in lora.modules_to_save; export.format=[adapter] works"
            )


def _piece(shard: Path, stored: str, parameter: str, name: str, base: Base, updates: Updates) -> Piece:
    replaced = updates.replaced.get(parameter)
    shape = base.parameters[parameter] if replaced is None else tuple(replaced.shape)
    return Piece(shard, stored, parameter, name, shape)
