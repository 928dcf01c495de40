"""The micro-step (forward, backward) as a CUDA graph: thousands of launches become one.

At a few thousand tokens a step the host cannot launch as fast as the GPU computes. The first
micro-batch of a shape runs as usual, for real; the second is captured, and every further one
replays. Shapes repeat because `inputs.py` rounds the value-dependent ones up.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.data.batch import Batch

from .decoder import FusedForward
from .inputs import Inputs


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    loss: Tensor


class GraphedMicroStep:
    """Forward and backward of one micro-batch; a drop-in for the loop's plain micro-step.

    Args:
        forward: the fused forward. Its adapters must have `main_grad`: a graph writes to fixed memory.
        parameters: the trainable parameters.
        max_graphs: captured shapes kept, least recently used out first.

    Attributes:
        scale: float32 scalar on the device, 1 / weight of the optimizer step; fill it in place.
    """

    def __init__(self, forward: FusedForward, parameters: list[nn.Parameter], max_graphs: int = 16) -> None:
        missing = sum(getattr(p, "main_grad", None) is None for p in parameters)
        assert not missing, f"{missing} parameters have no main_grad: make the optimizer first"
        self.forward, self.max_graphs = forward, max_graphs
        self.scale = torch.ones((), device=forward.device)
        self._seen: set[object] = set()
        self._graphs: OrderedDict[object, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if forward.device.type == "cuda" else None

    def _step(self, inputs: Inputs) -> Tensor:
        loss = self.forward.run(inputs)
        (loss * self.scale).backward()
        return loss.detach()

    def __call__(self, batch: Batch) -> Tensor:
        """Loss sum of `batch` (on the host, best), float32 scalar; gradients are added to `main_grad`."""
        inputs = self.forward.prepare(batch)
        if self._pool is None or not self.forward.capturable:
            return self._step(inputs)
        key = inputs.key
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return self._step(inputs)  # compiles kernels and lets cuDNN plan
            self._graphs[key] = self._capture(inputs)
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        for name, value in inputs.tensors().items():
            getattr(captured.inputs, name).copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def release(self) -> None:
        """Gives the memory of all captured graphs back; shapes that return are captured again."""
        self._graphs.clear()
        self._seen.clear()

    def _capture(self, inputs: Inputs) -> _Captured:
        static = Inputs(**{name: value.clone() for name, value in inputs.tensors().items()})
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._step(static)
        return _Captured(graph, static, loss)
