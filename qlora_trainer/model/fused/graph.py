"""The micro-step (forward, backward) as a CUDA graph: thousands of launches become one.

At a few thousand tokens a step the host cannot launch as fast as the GPU computes. The first
micro-batch of a shape runs as usual, for real; the second is captured, and every further one
replays. Shapes repeat because `inputs.py` rounds them up; where they are too many all the same, the
frequent ones are captured and the rest runs as usual: a graph takes longer to capture than to launch.
What keeps the GPU busy by its size runs as usual, too: a graph would only hold on to its memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import Batch

from ..forward import TokenNll
from .decoder import FusedForward
from .inputs import Buckets, Inputs

T = TypeVar("T")


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    loss: Tensor


class Frequent(Generic[T]):
    """Keeps what was made for the most frequent keys, `room` of them at most.

    A key is worth it from its second visit on; once there is no room, from twice as many visits as the
    rarest that is kept has had, whose place it takes. So nothing is made again for a few visits' sake.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: dict[Hashable, T] = {}
        self._visits: Counter[Hashable] = Counter()

    def visit(self, key: Hashable) -> T | None:
        """What is kept for the key."""
        self._visits[key] += 1
        return self.kept.get(key)

    def makes_room(self, key: Hashable) -> bool:
        """Whether something should be made for the key, which has just been visited; and room for it."""
        visits = self._visits[key]
        if visits > 1 and len(self.kept) >= self.room:
            rarest = min(self.kept, key=self._visits.__getitem__)
            if visits <= 2 * self._visits[rarest]:
                return False
            del self.kept[rarest]
        return visits > 1

    def clear(self) -> None:
        self.kept.clear()
        self._visits.clear()


class GraphedMicroStep:
    """Forward and backward of one micro-batch; a drop-in for the loop's plain micro-step.

    Args:
        objective: the loss sum of a micro-batch's tokens.
        forward: the fused forward. Its adapters must have `main_grad`: a graph writes to fixed memory.
        parameters: the trainable parameters.
        longest: tokens of the run's widest row; None: shapes are left as they come (`inputs.Buckets`).
        max_graphs: captured shapes kept.

    Attributes:
        scale: float32 scalar on the device, 1 / weight of the optimizer step; fill it in place.
    """

    def __init__(
        self,
        forward: FusedForward,
        objective: Callable[[TokenNll], Tensor],
        parameters: list[nn.Parameter],
        longest: int | None = None,
        max_graphs: int = 24,
    ) -> None:
        missing = sum(getattr(p, "main_grad", None) is None for p in parameters)
        assert not missing, f"{missing} parameters have no main_grad: make the optimizer first"
        self.forward, self.objective = forward, objective
        self._buckets = None if longest is None else Buckets(longest, forward.busy)
        self.scale = torch.ones((), device=forward.device)
        self._graphs = Frequent[_Captured](max_graphs)
        capturable = forward.device.type == "cuda" and forward.capturable
        self._pool = torch.cuda.graph_pool_handle() if capturable else None

    def _step(self, inputs: Inputs) -> Tensor:
        loss = self.objective(self.forward.run(inputs))
        (loss * self.scale).backward()
        return loss.detach()

    def __call__(self, batch: Batch) -> Tensor:
        """Loss sum of `batch` (on the host, best), float32 scalar; gradients are added to `main_grad`."""
        if self._pool is None or batch.input_ids.numel() >= self.forward.busy:
            return self._step(self.forward.prepare(batch))
        inputs = self.forward.prepare(batch, self._buckets)
        captured = self._graphs.visit(inputs.key)
        if captured is None:
            if not self._graphs.makes_room(inputs.key):
                return self._step(inputs)  # the first of a shape compiles kernels and lets cuDNN plan
            captured = self._graphs.kept[inputs.key] = self._capture(inputs)
        for name, value in inputs.tensors().items():
            getattr(captured.inputs, name).copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def release(self) -> None:
        """Gives the memory of all captured graphs back; shapes that return are captured again."""
        self._graphs.clear()

    def _capture(self, inputs: Inputs) -> _Captured:
        static = Inputs(**{name: value.clone() for name, value in inputs.tensors().items()})
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._step(static)
        return _Captured(graph, static, loss)
