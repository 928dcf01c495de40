"""What a layer keeps from its forward to its backward pass, and where: the activation policy.

Per layer, in bytes a token on the device and in pinned host memory (8B shape, bfloat16, r=16):

                 device   host
    none          92 KB     0    x, q/k/v, attention output, x2, gate/up: no recomputation
    mlp           36 KB     0    all of that but gate/up, which runs again (+23% FLOPs)
    offload        0 KB  36 KB   as mlp, and two copies over the bus
    full           8 KB     0    x: everything but the down projection runs again
    full_offload   0 KB   8 KB   as full, and two copies over the bus

The normed activations, the activation of the MLP and every operand of the adapters' gradients
are made again from these or are a few columns wide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

# policy -> what of a layer's forward pass runs twice; the down projection never does
RECOMPUTES = {
    "none": "nothing",
    "mlp": "gate_up",
    "full": "all but down",
    "offload": "gate_up",
    "full_offload": "all but down",
}
POLICIES = tuple(RECOMPUTES)
RECOMPUTED = ("full", "full_offload")  # from x
ON_HOST = ("offload", "full_offload")


class Saved:
    """One block's tensors between its passes; a field is None where the policy dropped it.

    A block's subclass is a dataclass and says which fields each way of recomputing makes again, and which
    are worth a trip over the bus.
    """

    again: ClassVar[dict[str, frozenset[str]]]
    travels: ClassVar[tuple[str, ...]]

    def drop(self, policy: str) -> None:
        """Lets go of what `policy` makes again."""
        for name in self.again[RECOMPUTES[policy]]:
            setattr(self, name, () if name == "state" else None)


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


_Place = tuple[int, str]  # a block's number in its layer, and the field


class HostStore:
    """Saved tensors of offloaded layers in pinned memory, moved on a stream of their own.

    Going out, a device tensor stays alive until its copy has ended, checked when a later layer arrives:
    the next, or under `offload`, whose copies take about as long as a layer, the next but one. Coming
    back, a layer's copies start when the backward pass of the offloaded layer above begins. Pinned
    memory is made once and reused.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._homes: dict[int, dict[_Place, _Home]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._arriving: dict[int, tuple[torch.cuda.Event, dict[_Place, Tensor]]] = {}
        self._order: list[int] = []  # layers put away in this pass, in order

    def reset(self) -> None:
        """Forgets what an earlier pass left behind (one whose backward never ran)."""
        self._release(0)
        self._arriving.clear()
        self._order.clear()

    def put(self, index: int, saved: Sequence[Saved], policy: str) -> None:
        """Starts the copies of layer `index`, if its policy is one of `ON_HOST`: what travels leaves `saved`.
        Every layer passes by: earlier copies are waited for here."""
        self._release(1 if policy == "offload" else 0)
        if policy not in ON_HOST:
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        homes, held = self._homes.setdefault(index, {}), []
        for number, block in enumerate(saved):
            for name in block.travels:
                tensor: Tensor | None = getattr(block, name)
                if tensor is None:
                    continue
                with torch.cuda.stream(self._stream):
                    homes.setdefault((number, name), _Home()).put(tensor)
                held.append(tensor)
                setattr(block, name, None)
        self._leaving.append((self._stream.record_event(), held))
        self._order.append(index)

    def _release(self, remaining: int) -> None:
        while len(self._leaving) > remaining:
            event, held = self._leaving.popleft()
            torch.cuda.current_stream().wait_event(event)
            held.clear()

    def _start(self, index: int) -> None:
        back = {
            place: torch.empty(home.shape, dtype=home.dtype, device=self._stream.device)
            for place, home in self._homes[index].items()
        }
        self._stream.wait_stream(torch.cuda.current_stream())  # the new memory may still be in use there
        with torch.cuda.stream(self._stream):
            for place, tensor in back.items():
                self._homes[index][place].get(tensor)
        self._arriving[index] = (self._stream.record_event(), back)

    def get(self, index: int, saved: Sequence[Saved]) -> None:
        """Puts the layer's tensors back into `saved`, on the device; starts fetching the layer below."""
        self._release(0)
        if index not in self._arriving:
            self._start(index)
        event, back = self._arriving.pop(index)
        torch.cuda.current_stream().wait_event(event)
        position = self._order.index(index)
        if position > 0:
            self._start(self._order[position - 1])
        del self._order[position:]
        for (number, name), tensor in back.items():
            setattr(saved[number], name, tensor)
