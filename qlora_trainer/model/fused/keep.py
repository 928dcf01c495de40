"""What a layer keeps from its forward to its backward pass, and where: the activation policy.

Per layer, in bytes a token on the device and in pinned host memory (8B shape, bfloat16, r=16):

                 device   host
    none          92 KB     0    x, q/k/v, attention output, x2, gate/up: no recomputation
    mlp           36 KB     0    all of that but gate/up, which runs again (+23% FLOPs)
    offload        0 KB  36 KB   as mlp, and two copies over the bus
    full           8 KB     0    x: everything but the down projection runs again
    full_offload   0 KB   8 KB   as full, and two copies over the bus

The normed activations, the activation of the MLP and every operand of the adapters' thin products
are made again from these or are a few columns wide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qlora_trainer.kernels.attention import State

POLICIES = ("none", "mlp", "full", "offload", "full_offload")
RECOMPUTED = ("full", "full_offload")  # from x
ON_HOST = ("offload", "full_offload")


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
    """What `policy` keeps (before the copies, where they follow)."""
    if policy == "none":
        return saved
    if policy in RECOMPUTED:
        return Saved(**{f.name: getattr(saved, f.name) for f in fields(Saved) if f.name in _FULL})
    saved.gate_up = saved.u_gate_up = None
    return saved


class _Home:
    """Pinned memory for one tensor of one layer, in pieces; it grows to the largest that came and stays.

    PyTorch's allocator of pinned memory rounds every request up to a power of two: a tensor in one piece
    could take twice its size. Pieces are kept for good because captured graphs copy to their addresses.
    """

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.shape, self.dtype = torch.Size(), torch.float32

    def put(self, tensor: Tensor) -> None:
        """Starts copying a contiguous `tensor` here."""
        self.shape, self.dtype = tensor.shape, tensor.dtype
        missing = tensor.nbytes - sum(piece.numel() for piece in self.pieces)
        self.pieces += [torch.empty(n, dtype=torch.uint8, pin_memory=True) for n in pieces(missing)]
        for piece, part in self._pairs(tensor):
            piece.copy_(part, non_blocking=True)

    def get(self, tensor: Tensor) -> None:
        """Starts copying what is here into `tensor`."""
        for piece, part in self._pairs(tensor):
            part.copy_(piece, non_blocking=True)

    def _pairs(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        left = tensor.view(-1).view(torch.uint8)
        for piece in self.pieces:
            n = min(piece.numel(), left.numel())
            if n:
                yield piece[:n], left[:n]
            left = left[n:]


def pieces(size: int, smallest: int = 1 << 20) -> list[int]:
    """Powers of two that add up to `size` bytes, the largest first; what is below `smallest` stays whole."""
    found = []
    while size >= smallest:
        found.append(1 << (size.bit_length() - 1))
        size -= found[-1]
    return [*found, size] if size > 0 else found


class HostStore:
    """Saved tensors of offloaded layers in pinned memory, moved on a stream of their own.

    Going out, a device tensor stays alive until its copy has ended, checked when a later layer arrives:
    the next, or under `offload`, whose copies take about as long as a layer, the next but one. Coming
    back, a layer's copies start when the backward pass of the offloaded layer above begins. Pinned
    memory is made once and reused.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._homes: dict[int, dict[str, _Home]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._arriving: dict[int, tuple[torch.cuda.Event, dict[str, Tensor]]] = {}
        self._order: list[int] = []  # layers put away in this pass, in order

    def reset(self) -> None:
        """Forgets what an earlier pass left behind (one whose backward never ran)."""
        self._release(0)
        self._arriving.clear()
        self._order.clear()

    def put(self, index: int, saved: Saved, policy: str) -> Saved:
        """Starts the copies of layer `index`, if its policy is one of `ON_HOST`; returns what stays on the
        device. Every layer passes by: earlier copies are waited for here."""
        self._release(1 if policy == "offload" else 0)
        if policy not in ON_HOST:
            return saved
        self._stream.wait_stream(torch.cuda.current_stream())
        homes, held = self._homes.setdefault(index, {}), []
        for name in _WIDE:
            tensor: Tensor | None = getattr(saved, name)
            if tensor is None:
                continue
            with torch.cuda.stream(self._stream):
                homes.setdefault(name, _Home()).put(tensor)
            held.append(tensor)
            setattr(saved, name, None)
        self._leaving.append((self._stream.record_event(), held))
        self._order.append(index)
        return saved

    def _release(self, remaining: int) -> None:
        while len(self._leaving) > remaining:
            event, held = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)
            held.clear()

    def _start(self, index: int) -> None:
        back = {
            name: torch.empty(home.shape, dtype=home.dtype, device=self._stream.device)
            for name, home in self._homes[index].items()
        }
        self._stream.wait_stream(torch.cuda.current_stream())  # the new memory may still be in use there
        with torch.cuda.stream(self._stream):
            for name, tensor in back.items():
                self._homes[index][name].get(tensor)
        self._arriving[index] = (self._stream.record_event(), back)

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
