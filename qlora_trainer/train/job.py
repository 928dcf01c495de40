"""What a training run is made of: where it stands, what it works with, whom it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_trainer.data.batch import Batch
from qlora_trainer.data.loader import StepBatch
from qlora_trainer.model.forward import Forward, TokenNll
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.health import MemoryGuard


@dataclass
class Progress:
    """Where a run stands; with the tensors, all that the next step depends on.

    Attributes:
        step: optimizer steps done.
        epoch, index: the loader's position of the next step.
        tokens, supervised: non-padding and labelled tokens trained on so far, all ranks.
        nonfinite: steps in a row, up to the last, whose loss or gradient was not finite.
        best_loss, best_step: the lowest evaluation loss so far and where it was.
        evaluated: the last step that was evaluated.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    tokens: int = 0
    supervised: int = 0
    nonfinite: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluated: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Optimizer(Protocol):
    grad: Tensor

    def step(self, lr: float, max_grad_norm: float) -> Tensor: ...

    def zero_grad(self) -> None: ...

    def release_gpu_pages(self) -> int: ...

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


class Loader(Protocol):
    def steps_per_epoch(self, epoch: int) -> int: ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]: ...


class BatchStep(Protocol):
    """Forward and backward of one micro-batch on the host; returns its loss sum."""

    scale: Tensor  # float32 scalar on the device, 1 / weight of the whole optimizer step; filled in place

    def __call__(self, batch: Batch) -> Tensor: ...


class MicroStep:
    """Forward and backward of one micro-batch; gradients land in the optimizer's flat buffer.

    `scale` is a device scalar (1 / weight of the whole step), so that the same captured work serves
    every step.
    """

    def __init__(
        self, forward: Forward, objective: Callable[[TokenNll], Tensor], device: torch.device
    ) -> None:
        self.forward, self.objective, self.device = forward, objective, device
        self.scale = torch.ones((), device=device)

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.objective(self.forward(batch.to(self.device)))
        (loss * self.scale).backward()
        return loss.detach()


@dataclass
class Job:
    """A training run, from `progress` to `total_steps`; lengths are in optimizer steps.

    Attributes:
        schedule: optimizer step (from 0) -> learning rate.
        log: takes one record per logged step and per evaluation, in order.
        save: writes a checkpoint of `progress` and everything it goes with.
        tidy: called after it, removes older ones.
        evaluate: evaluation results by name; None if it was given up because a stop was requested.
            Where it fails on one rank it raises on all.
        stop_requested: asked after every step, and between micro-batches once a step has taken
            `loop.PATIENCE` seconds (it is then undone); true on any rank stops all at the same step.
        memory: tries a step that ran out of memory once more.
        save_steps, eval_steps: 0 means only at the end.
    """

    progress: Progress
    micro_step: BatchStep
    optimizer: Optimizer
    loader: Loader
    ranks: Ranks
    memory: MemoryGuard
    schedule: Callable[[int], float]
    total_steps: int
    max_grad_norm: float
    log: Callable[[dict[str, Any]], None]
    save: Callable[[Progress], None]
    tidy: Callable[[Progress], None] = lambda progress: None
    evaluate: Callable[[], dict[str, float] | None] | None = None
    stop_requested: Callable[[], bool] = lambda: False
    save_steps: int = 0
    eval_steps: int = 0
    logging_steps: int = 1


def count_steps(loader: Loader, epochs: float) -> int:
    """Optimizer steps in `epochs` passes over the data; a fraction of the last pass is rounded up."""
    whole = int(epochs)
    steps = sum(loader.steps_per_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        steps += -int(-(epochs - whole) * loader.steps_per_epoch(whole) // 1)
    return steps
