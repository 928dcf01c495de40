"""The training loop: the one place that calls backward.

In: a `forward` that gives a batch its loss sum, a loader that is a pure function of (epoch, index),
an optimizer with a flat gradient buffer, and callbacks. Out: `Progress`, moved to the last step.

The loss of an optimizer step is sum(weight * cross-entropy) / sum(weight) over every micro-batch of
every rank. The loader knows the denominator beforehand, so accumulating over micro-batches or over
ranks gives the gradient of one large batch, and nothing but the gradient itself is communicated.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_trainer.data.batch import Batch
from qlora_trainer.data.loader import StepBatch
from qlora_trainer.errors import DivergedError, PreemptedError
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.readback import Readback

MAX_NONFINITE_IN_A_ROW = 3


@dataclass
class Progress:
    """Where a run stands; with the tensors, all that the next step depends on.

    Attributes:
        step: optimizer steps done.
        epoch, index: the loader's position of the next step.
        tokens, supervised: non-padding and labelled tokens trained on so far, all ranks.
        nonfinite: steps in a row, up to the last, whose loss or gradient was not finite.
        best_loss, best_step: the lowest evaluation loss so far and where it was.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    tokens: int = 0
    supervised: int = 0
    nonfinite: int = 0
    best_loss: float | None = None
    best_step: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoopOptions:
    """Lengths in optimizer steps; 0 for `save_steps` or `eval_steps` means only at the end."""

    total_steps: int
    max_grad_norm: float
    save_steps: int = 0
    eval_steps: int = 0
    logging_steps: int = 1


@dataclass(frozen=True)
class StepTag:
    """What travels beside a step's numbers until they arrive on the host."""

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    supervised: int
    rows: tuple[int, ...]
    batch: str
    started: float


class Optimizer(Protocol):
    grad: Tensor

    def step(self, lr: float, max_grad_norm: float) -> Tensor: ...

    def zero_grad(self) -> None: ...

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


class Loader(Protocol):
    def steps_per_epoch(self, epoch: int) -> int: ...

    def steps(self, epoch: int, start: int = 0) -> Iterator[StepBatch]: ...


class MicroStep:
    """Forward and backward of one micro-batch; gradients land in the optimizer's flat buffer.

    `scale` is a device scalar (1 / weight of the whole step), so that the same captured work serves
    every step.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], device: torch.device) -> None:
        self.forward = forward
        self.scale = torch.ones((), device=device)

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.forward(batch)
        (loss * self.scale).backward()
        return loss.detach()


def count_steps(loader: Loader, epochs: float) -> int:
    """Optimizer steps in `epochs` passes over the data; a fraction of the last pass is rounded up."""
    whole = int(epochs)
    steps = sum(loader.steps_per_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        steps += -int(-(epochs - whole) * loader.steps_per_epoch(whole) // 1)
    return steps


def train(
    progress: Progress,
    micro_step: Callable[[Batch], Tensor],
    scale: Tensor,
    optimizer: Optimizer,
    loader: Loader,
    schedule: Callable[[int], float],
    options: LoopOptions,
    ranks: Ranks,
    *,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[Progress], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Progress:
    """Trains from `progress` to `options.total_steps`, in place.

    Args:
        micro_step, scale: see `MicroStep`; `scale` is the tensor it reads.
        schedule: optimizer step (from 0) -> learning rate.
        log: takes one record per logged step and per evaluation, in order.
        save: writes a checkpoint of `progress` and everything it goes with.
        stop_requested: asked after every step; true on any rank stops all at the same step.

    Raises:
        DivergedError: loss or gradient was not finite three steps in a row. Such a step leaves
            weights and moments as they were.
        PreemptedError: a stop was requested; the state has been saved.
    """
    readback: Readback[StepTag] = Readback()
    last_arrival = time.monotonic()

    def drain(everything: bool = False) -> None:
        nonlocal last_arrival
        for tag, (loss, grad_norm) in readback.ready(drain=everything):
            now = time.monotonic()
            seconds, last_arrival = now - max(last_arrival, tag.started), now
            finite = _is_finite(loss) and _is_finite(grad_norm)
            progress.nonfinite = 0 if finite else progress.nonfinite + 1
            if tag.step % options.logging_steps == 0 or tag.step == options.total_steps or not finite:
                log(_record(tag, loss, grad_norm, seconds, finite))
            if progress.nonfinite >= MAX_NONFINITE_IN_A_ROW:
                raise DivergedError(
                    f"loss or gradient was not finite {MAX_NONFINITE_IN_A_ROW} steps in a row, up to step "
                    f"{tag.step} (rows {_short(tag.rows)}); weights are those of the last finite step: "
                    "lower train.learning_rate, or look at these rows with `inspect`"
                )

    steps = _steps(loader, progress.epoch, progress.index)
    while progress.step < options.total_steps:
        started = time.monotonic()
        epoch, index = progress.epoch, progress.index
        step_batch = next(steps)
        scale.fill_(1.0 / max(step_batch.total_weight, 1e-8))
        loss_sum = torch.zeros((), device=ranks.device)
        counts = torch.zeros(2, dtype=torch.int64)
        checksum = 0
        rows: list[int] = []
        for batch in step_batch.micro_batches:
            counts += torch.tensor([batch.n_tokens, batch.n_supervised])
            checksum = zlib.crc32(batch.input_ids.numpy().tobytes(), checksum)
            rows += batch.rows
            loss_sum += micro_step(batch.to(ranks.device))
        ranks.sum_(optimizer.grad)
        ranks.sum_(loss_sum)
        ranks.sum_control(counts)
        learning_rate = schedule(progress.step)
        grad_norm = optimizer.step(learning_rate, options.max_grad_norm)
        optimizer.zero_grad()

        per_epoch = loader.steps_per_epoch(epoch)
        progress.step += 1
        progress.epoch, progress.index = (epoch, index + 1) if index + 1 < per_epoch else (epoch + 1, 0)
        progress.tokens += int(counts[0])
        progress.supervised += int(counts[1])
        tag = StepTag(
            step=progress.step,
            epoch=epoch + (index + 1) / per_epoch,
            learning_rate=learning_rate,
            tokens=int(counts[0]),
            supervised=int(counts[1]),
            rows=tuple(rows),
            batch=f"{checksum:08x}",
            started=started,
        )
        readback.push(tag, torch.stack((loss_sum * scale, grad_norm.to(loss_sum.dtype))))
        drain()

        last = progress.step == options.total_steps
        stopping = ranks.any(stop_requested()) and not last
        if evaluate is not None and not stopping and (last or _due(progress.step, options.eval_steps)):
            drain(everything=True)
            result = evaluate()
            if progress.best_loss is None or result["eval_loss"] < progress.best_loss:
                progress.best_loss, progress.best_step = result["eval_loss"], progress.step
            log({"step": progress.step, **result})
            last_arrival = time.monotonic()
        if last or stopping or _due(progress.step, options.save_steps):
            drain(everything=True)
            save(progress)
            last_arrival = time.monotonic()
        if stopping:
            raise PreemptedError(
                f"stopped on a signal after step {progress.step} of {options.total_steps}; "
                "the state is saved: run the same command to go on"
            )
    return progress


def _steps(loader: Loader, epoch: int, index: int) -> Iterator[StepBatch]:
    """Batches from a position on, epoch after epoch, prepared ahead by the loader's workers."""
    while True:
        yield from loader.steps(epoch, index)
        epoch, index = epoch + 1, 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for NaN too


def _record(tag: StepTag, loss: float, grad_norm: float, seconds: float, finite: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": tag.step,
        "epoch": round(tag.epoch, 4),
        "loss": loss,
        "learning_rate": tag.learning_rate,
        "grad_norm": grad_norm,
        "tokens": tag.tokens,
        "supervised": tag.supervised,
        "tokens_per_second": round(tag.tokens / seconds, 1) if seconds > 0 else None,
        "batch": tag.batch,
    }
    if not finite:
        record |= {"nonfinite": True, "rows": list(tag.rows)}
    return record


def _short(rows: tuple[int, ...], limit: int = 8) -> str:
    shown = ", ".join(map(str, rows[:limit]))
    return shown if len(rows) <= limit else f"{shown}, … ({len(rows)} in all)"
