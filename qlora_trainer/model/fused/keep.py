"""What a layer keeps from its forward to its backward pass, and where: the activation policy.

Per layer, in bytes a token (8B shape, bfloat16, r=16):

    none     x, q/k/v, attention output, x2, gate/up   92 KB   no recomputation
    mlp      all of that but gate/up                   36 KB   gate/up again (+23% FLOPs)
    offload  as mlp, in pinned host memory              0 KB   the same, and two copies over the bus
    full     x                                          8 KB   everything but the down projection

The normed activations, the activation of the MLP and every operand of the adapters' thin products
are made again from these or are a few columns wide.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qlora_trainer.kernels.attention import State

POLICIES = ("none", "mlp", "full", "offload")


@dataclass
class Saved:
    """One layer's tensors between its passes; None where the policy dropped one. M tokens."""

    x: Tensor | None = None  # [M, h] the residual stream at the layer's input
    rstd1: Tensor | None = None  # float32 [M]
    qkv: Tensor | None = None  # [M, (Hq+2Hk)D] rotated, or raw where head norms need it raw
    attended: Tensor | None = None  # [M, Hq*D]
    state: State = ()
    y_attention: Tensor | None = None  # [M, h] before the attention output norm, if there is one
    rstd_attention: Tensor | None = None
    x2: Tensor | None = None  # [M, h] the residual stream between attention and MLP
    rstd2: Tensor | None = None
    gate_up: Tensor | None = None  # [M, 2F + border]
    y_mlp: Tensor | None = None  # [M, h] before the MLP output norm, if there is one
    rstd_mlp: Tensor | None = None
    u_qkv: Tensor | None = None  # [M, rank] projections on the adapters
    u_o: Tensor | None = None
    u_gate_up: Tensor | None = None
    u_down: Tensor | None = None


_FULL = {"x", "u_down", "y_mlp", "rstd_mlp"}
_WIDE = ("x", "qkv", "attended", "y_attention", "x2", "y_mlp")  # what is worth a trip over the bus


def keep_only(saved: Saved, policy: str) -> Saved:
    """What `policy` keeps on the device (offload: before the copies)."""
    if policy == "none":
        return saved
    if policy == "full":
        return Saved(**{f.name: getattr(saved, f.name) for f in fields(Saved) if f.name in _FULL})
    saved.gate_up = saved.u_gate_up = None
    return saved


class HostStore:
    """Saved tensors of offloaded layers in pinned memory, moved on a stream of their own.

    Going out, a device tensor stays alive until its copy has ended, checked when the next layer but
    one arrives: no more than two layers are in flight. Coming back, a layer's copies start when the
    backward pass of the layer above begins. The pinned buffers are made once and reused.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned: dict[tuple[int, str], Tensor] = {}
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._arriving: dict[int, tuple[torch.cuda.Event, dict[str, Tensor]]] = {}
        self._order: list[int] = []  # layers put away in this pass, in order

    def reset(self) -> None:
        """Forgets what an earlier pass left behind (one whose backward never ran)."""
        self._release(0)
        self._arriving.clear()
        self._order.clear()

    def put(self, index: int, saved: Saved) -> Saved:
        """Starts the copies of layer `index`; returns what stays on the device."""
        self._release(1)
        self._stream.wait_stream(torch.cuda.current_stream())
        held = []
        with torch.cuda.stream(self._stream):
            for name in _WIDE:
                tensor: Tensor | None = getattr(saved, name)
                if tensor is None:
                    continue
                key = (index, name)
                if key not in self._pinned or self._pinned[key].shape != tensor.shape:
                    self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._pinned[key].copy_(tensor, non_blocking=True)
                held.append(tensor)
                setattr(saved, name, None)
            event = torch.cuda.Event()
            event.record()
        self._leaving.append((event, held))
        self._order.append(index)
        return saved

    def _release(self, remaining: int) -> None:
        while len(self._leaving) > remaining:
            event, held = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)
            held.clear()

    def _start(self, index: int) -> None:
        names = [name for name in _WIDE if (index, name) in self._pinned]
        back = {
            name: torch.empty_like(self._pinned[index, name], device=self._stream.device, pin_memory=False)
            for name in names
        }
        self._stream.wait_stream(torch.cuda.current_stream())  # the new memory may still be in use there
        with torch.cuda.stream(self._stream):
            for name, tensor in back.items():
                tensor.copy_(self._pinned[index, name], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arriving[index] = (event, back)

    def get(self, index: int, saved: Saved) -> Saved:
        """The layer's tensors back on the device; starts fetching the layer below."""
        self._release(0)
        if index not in self._arriving:
            self._start(index)
        event, back = self._arriving.pop(index)
        torch.cuda.current_stream().wait_event(event)
        position = self._order.index(index)
        if position > 0:
            self._start(self._order[position - 1])
        del self._order[position:]
        for name, tensor in back.items():
            setattr(saved, name, tensor)
        return saved
