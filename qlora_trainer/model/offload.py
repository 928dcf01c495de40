"""Decoder layers whose 4-bit weights live in pinned host memory and stream through the device.

In: a model with adapters whose layers are 4-bit, then the fast path made from it. Out: the same
model with room on the device for two layers' codes instead of all of them, and the same numbers.
While a layer computes, the next one in the direction of travel arrives: upwards in the forward pass,
downwards in the backward pass. Scales, adapters, norms, embeddings and head stay on the device.

Only the fast path reads such a model; transformers' own modules do not find the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.kernels import QuantizedWeight
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.model.fused.layer import FusedLayer


def offload_layers(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> int:
    """Move `model` to `device`, but the 4-bit codes of `layers` to pinned host memory.

    The model may come from the host or the device; a layer's codes leave the device before those of
    the next are touched. Where it was on the device, the scales leave and come back: between codes that
    are gone, each of them would hold on to some twenty MiB that nothing else could use. Call it after
    adapters are attached, before the optimizer is made. Returns the bytes on the host.

    Raises:
        ConfigError: a layer has no 4-bit weight.
    """
    taken = 0
    for number, layer in enumerate(layers):
        linears = [module for module in layer.modules() if isinstance(module, bnb.nn.Linear4bit)]
        if not linears:
            raise ConfigError(
                f"model.offload=layers: layer {number} has no 4-bit weights; set quantization.method=nf4"
            )
        size = sum(linear.weight.numel() for linear in linears)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        start = 0
        for linear in linears:
            weight: Any = linear.weight
            home = buffer[start : start + weight.numel()].view(weight.shape)
            home.copy_(weight.data)
            weight.data = home
            weight.quant_state.to("cpu")
            start += weight.numel()
        taken += size
    codes: list[Any] = [m.weight for x in layers for m in x.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for weight in codes:
        weight.quant_state.to(device)
    at_home = {id(weight) for weight in codes}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in at_home:
                parameter.data = parameter.data.to(device)
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))
    return taken


class StreamedWeights:
    """A `WeightStore` of two slots on the device that the layers of a fused forward pass through.

    Args:
        forward: made by `fuse` from a model that `offload_layers` prepared; this becomes its store.
    """

    def __init__(self, forward: FusedForward) -> None:
        self.device = forward.device
        self._homes: list[Tensor] = []  # codes of each layer, uint8 [bytes], on the host
        self._layers: dict[int, int] = {}  # where a layer's codes are at home -> its number
        for number, layer in enumerate(forward.layers):
            if not isinstance(layer, FusedLayer):
                raise ConfigError(
                    "model.offload=layers streams layers of the fast path, and some are not of it "
                    "(see the reasons above); set model.offload=none"
                )
            self._homes.append(self._home(layer))
            self._layers[self._homes[-1].untyped_storage().data_ptr()] = number
        widest = max(home.numel() for home in self._homes)
        self._slots = [torch.empty(widest, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._holds: list[int | None] = [None, None]
        self._last, self._direction = 0, 1
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)
            self._arrived = [torch.cuda.Event(), torch.cuda.Event()]
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        forward.workspace.store = self

    @property
    def nbytes(self) -> int:
        """Device bytes of the two slots."""
        return sum(slot.nbytes for slot in self._slots)

    @staticmethod
    def _home(layer: FusedLayer) -> Tensor:
        weights = [m.weight for p in layer.projections for m in p.members]
        storages = {
            w.packed.untyped_storage().data_ptr(): w.packed for w in weights if isinstance(w, QuantizedWeight)
        }
        assert len(storages) == 1, "offload_layers puts a layer's codes into one buffer"
        (packed,) = storages.values()
        assert packed.device.type == "cpu", "offload_layers comes first"
        whole = torch.empty(0, dtype=torch.uint8)
        return whole.set_(packed.untyped_storage())

    def codes(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight with its codes in the layer's slot."""
        home = weight.packed
        slot = self._slot(self._layers[home.untyped_storage().data_ptr()])
        start = home.storage_offset()
        return replace(weight, packed=slot[start : start + home.numel()].view(home.shape))

    def _slot(self, number: int) -> Tensor:
        """The codes of layer `number` on the device, uint8 [bytes]; starts fetching the one after it."""
        if number != self._last:
            self._direction = 1 if number > self._last else -1
            self._last = number
        if number not in self._holds:
            self._fetch(number, 0 if self._holds[0] is None else 1)
        here = self._holds.index(number)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._arrived[here])
        coming = number + self._direction
        if 0 <= coming < len(self._homes) and coming not in self._holds:
            self._fetch(coming, 1 - here)
        return self._slots[here]

    def _fetch(self, number: int, slot: int) -> None:
        home = self._homes[number]
        room = self._slots[slot][: home.numel()]
        self._holds[slot] = number
        if self.device.type != "cuda":
            room.copy_(home)
            return
        # Whatever reads the slot's present tenant has been enqueued before.
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            room.copy_(home, non_blocking=True)
            self._arrived[slot].record()
