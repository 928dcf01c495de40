"""What one pass over the model gives every layer, and what the layers hand each other on the way back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_trainer.kernels.attention import Layout

from .adapter_columns import Widened


@dataclass
class Call:
    """One pass.

    rotary: layer type -> (cos, sin), float32 [M, half]. training: a backward pass will follow.
    adapters: False computes the base alone, without a backward pass.
    position_ids [B, T] and document_ids (int32 [B, T], if packed): what unfused layers read instead.
    seed: int64 [], what LoRA dropout's masks are made from; None where nothing is dropped.
    anchor: an empty leaf that stands for adapters whose gradient goes to `main_grad` and is no business of
    autograd's. Of this pass alone: autograd waits for the stream on which a leaf was first used, and a pass
    that is captured must not wait for one that was not.
    """

    layout: Layout
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    training: bool
    adapters: bool
    position_ids: Tensor
    document_ids: Tensor | None
    seed: Tensor | None
    anchor: Tensor
    _handed: Widened | None = None

    def hand(self, gradient: Widened) -> Tensor:
        """Gives the layer below its gradient with the buffer around it; returns what autograd carries."""
        self._handed = gradient
        return gradient.values

    def take(self, gradient: Tensor) -> Widened:
        """The buffer around the gradient [M, h] that autograd brought, if the layer above handed it over."""
        handed, self._handed = self._handed, None
        if handed is not None and handed.values.data_ptr() == gradient.data_ptr():
            return handed  # it is alive, so nothing else can be at its address
        return Widened(gradient, gradient.shape[1])
