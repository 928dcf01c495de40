"""A `Batch` as the tensors the decoder reads: shifted targets, document borders, nothing to ask the GPU.

Everything that depends on values (how many labels, where documents end) is settled on the host, so
that the pass itself never waits for the device and its shapes repeat: the number of supervised
positions and of documents is rounded up. Micro-batches for which graphs are to be captured are rounded
up further, rows included: rows of 50 to 512 tokens then have 14 widths and not 58.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_trainer.data.batch import IGNORE, Batch
from qlora_trainer.kernels.attention import Layout

from .head import SUPERVISED_STEP, Supervised

# Tokens times the weights of a layer from which the GPU computes for longer than the host launches: 4 FLOPs
# each at 700 TFLOP/s take the 5 ms that a layer's 75 launches do (one H100). 4127 tokens of an 8B model.
BUSY = 9e11


def busy_tokens(layer_weights: int) -> int:
    """Tokens of a micro-batch from which graphs gain nothing, and padding costs what it weighs."""
    return int(BUSY / max(1, layer_weights))


@dataclass(frozen=True)
class Buckets:
    """Shapes that few graphs serve: of fewer than `busy` tokens, rounded up, rows to `longest` at most."""

    longest: int
    busy: int


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device. B rows of T tokens, S supervised positions.

    cu_seqlens: int32 [documents + 1] when packed on CUDA. document_ids: int32 [B, T] when packed.
    hidden: [B, T, h], the embeddings, when their table lives on the host.
    seed: int64 [], of LoRA dropout's masks, when there is any.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    cu_seqlens: Tensor | None = None
    document_ids: Tensor | None = None
    hidden: Tensor | None = None
    seed: Tensor | None = None

    @property
    def layout(self) -> Layout:
        batch, length = self.position_ids.shape
        return Layout(
            batch, length, self.cu_seqlens, None if self.cu_seqlens is not None else self.document_ids
        )

    @property
    def supervised(self) -> Supervised:
        return Supervised(self.rows, self.targets, self.weights)

    def tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def key(self) -> tuple[tuple[str, torch.Size], ...]:
        """Equal for micro-batches that one captured graph serves."""
        return tuple((name, value.shape) for name, value in self.tensors().items())


def _round_up(n: int, step: int) -> int:
    return max(step, -(-n // step) * step)


def pad_to_bucket(batch: Batch, buckets: Buckets) -> Batch:
    """Rows padded to one of four widths between powers of two, by 8% on average."""
    rows, width = batch.input_ids.shape
    step = max(8, 1 << max(0, (width - 1).bit_length() - 3))
    missing = min(buckets.longest, _round_up(width, step)) - width
    if rows * width >= buckets.busy or missing <= 0:
        return batch
    padding = {"input_ids": 0, "labels": IGNORE, "loss_weights": 0, "position_ids": 0, "document_ids": -1}
    wider: dict[str, Any] = {
        name: F.pad(getattr(batch, name), (0, missing), value=value) for name, value in padding.items()
    }
    return replace(batch, **wider)


def supervised_positions(batch: Batch, buckets: Buckets | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, targets, weights): position t predicts the label at t + 1; S rounded up with weight 0.

    buckets: of a small micro-batch, to a quarter of its tokens.
    """
    labels, weights = batch.labels[:, 1:], batch.loss_weights[:, 1:]
    row, column = (labels != IGNORE).nonzero(as_tuple=True)
    n = row.numel()
    step = SUPERVISED_STEP if n > SUPERVISED_STEP else 64
    if buckets is not None and batch.labels.numel() < buckets.busy:
        step = _round_up(batch.labels.numel() // 4, 64)
    padded = _round_up(n, step)
    rows = torch.zeros(padded, dtype=torch.int64)
    targets = torch.zeros(padded, dtype=torch.int64)
    weight = torch.zeros(padded, dtype=torch.float32)
    rows[:n] = row * batch.labels.shape[1] + column
    targets[:n] = labels[row, column]
    weight[:n] = weights[row, column]
    return rows, targets, weight


def document_borders(document_ids: Tensor) -> Tensor:
    """int32 borders of documents among the flattened tokens; each row's padding is a document too.

    The number of borders is rounded up to a multiple of 64 by repeating the last (empty documents).
    """
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = first.flatten().nonzero().squeeze(1).to(torch.int32)
    borders = torch.full((_round_up(starts.numel() + 1, 64),), document_ids.numel(), dtype=torch.int32)
    borders[: starts.numel()] = starts
    return borders


def prepare(
    batch: Batch,
    device: torch.device,
    embeddings: Tensor | None = None,
    dropout: bool = False,
    buckets: Buckets | None = None,
) -> Inputs:
    """Inputs of `batch`, which should still be on the host: from a GPU it has to be fetched first.

    embeddings: [V, h] on the host, if the table does not live on `device`.
    dropout: draw a seed, from torch's generator on the CPU: who restores that repeats the masks.
    buckets: round shapes up so that few graphs serve them all.
    """
    batch = batch.to("cpu", non_blocking=False) if batch.input_ids.device.type != "cpu" else batch
    if buckets is not None:
        batch = pad_to_bucket(batch, buckets)
    rows, targets, weights = supervised_positions(batch, buckets)
    found: dict[str, Tensor | None] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "rows": rows,
        "targets": targets,
        "weights": weights,
    }
    if batch.packed:
        found["document_ids"] = batch.document_ids
        if device.type == "cuda":
            found["cu_seqlens"] = document_borders(batch.document_ids)
    if embeddings is not None:
        found["hidden"] = torch.nn.functional.embedding(batch.input_ids, embeddings)
    if dropout:
        found["seed"] = torch.randint(2**63 - 1, ())
    if device.type != "cpu":
        found = {
            k: v if v is None else v.pin_memory().to(device, non_blocking=True) for k, v in found.items()
        }
    return Inputs(**found)  # type: ignore[arg-type]
