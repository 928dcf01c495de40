"""What a decoder layer computes with: the description of `spec`, bound to its weights."""

from __future__ import annotations

from dataclasses import dataclass

from .attention import AttentionParts
from .mlp import MlpParts


@dataclass(frozen=True)
class LayerParts:
    """A pre-norm decoder layer: attention, then the MLP."""

    attention: AttentionParts
    mlp: MlpParts
