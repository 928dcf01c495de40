"""The one object that travels from the data room to the model: a micro-batch of token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # label of a position that is not supervised (PyTorch's cross-entropy default)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B rows of T tokens, each row one padded document or one pack of documents.

    Padding is always on the right, so causal attention never lets a real token see it and no
    attention mask is needed beyond the document borders.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], *unshifted*: `labels[b, t]` is `input_ids[b, t]` where that token is
            supervised and `IGNORE` elsewhere. The first token of every document is `IGNORE`, so
            shifting by one never predicts across a border.
        loss_weights: float32 [B, T], weight of predicting token t; 0 where `labels` is `IGNORE`.
        position_ids: int64 [B, T], from 0 in every document; 0 in padding.
        document_ids: int32 [B, T], 0, 1, … along a row; -1 in padding.
        rows: indices into the tokenized data of the documents in here, in order of appearance.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    document_ids: Tensor
    rows: tuple[int, ...]

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document (so attention needs isolating)."""
        return bool((self.document_ids > 0).any())

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.document_ids >= 0).sum())

    @property
    def n_supervised(self) -> int:
        """Tokens with a label."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        move = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "document_ids")
        }
        return replace(self, **move)
