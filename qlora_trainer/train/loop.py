"""The training loop: the one place that calls backward.

In: a micro-step that gives a batch its loss sum and its gradients, a loader that is a pure function of
(epoch, index), an optimizer with a flat gradient buffer, and callbacks. Out: `Progress`, at the last step.

The loss of an optimizer step is sum(weight * cross-entropy) / sum(weight) over every micro-batch of
every rank. The loader knows the denominator beforehand, so accumulating over micro-batches or over
ranks gives the gradient of one large batch, and nothing but the gradient itself is communicated.

Whatever fails, the state after the last whole step is saved: batches, forward and backward are undone,
evaluations and records come after a step. Only a failure inside the update itself leaves nothing whole;
then the checkpoint before stays the last.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_trainer.checkpoint import rng
from qlora_trainer.data.batch import Batch
from qlora_trainer.data.loader import StepBatch
from qlora_trainer.errors import DivergedError, PreemptedError, QLoRAError, explained
from qlora_trainer.model.forward import Forward, TokenNll
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.health import MemoryGuard, count_nonfinite, poison
from qlora_trainer.train.readback import Pace, Readback
from qlora_trainer.train.record import StepTag, is_finite, record_of

PATIENCE = 5.0  # seconds of a step after which it is undone rather than finished when a run has to stop


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


@dataclass(frozen=True)
class LoopOptions:
    """Lengths in optimizer steps; 0 for `save_steps` or `eval_steps` means only at the end."""

    total_steps: int
    max_grad_norm: float
    save_steps: int = 0
    eval_steps: int = 0
    logging_steps: int = 1


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
    tidy: Callable[[Progress], None] = lambda progress: None,
    evaluate: Callable[[], dict[str, float] | None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    memory: MemoryGuard | None = None,
) -> Progress:
    """Trains from `progress` to `options.total_steps`, in place.

    Args:
        micro_step, scale: see `MicroStep`; `scale` is the tensor it reads.
        schedule: optimizer step (from 0) -> learning rate.
        log: takes one record per logged step and per evaluation, in order.
        save: writes a checkpoint of `progress` and everything it goes with.
        tidy: called after it, removes older ones.
        evaluate: evaluation results by name; None if it was given up because a stop was requested.
            Where it fails on one rank it raises on all.
        stop_requested: asked after every step, and between micro-batches once a step has taken
            `PATIENCE` seconds (it is then undone); true on any rank stops all at the same step.
        memory: tries a step that ran out of memory once more.

    Raises:
        DivergedError: loss or gradient was not finite three steps in a row. Such a step leaves
            weights and moments as they were.
        PreemptedError: a stop was requested; the state has been saved.
        QLoRAError: anything else that failed, as `explained`: the message says which state is saved.
    """
    memory = memory or MemoryGuard(ranks.device)
    readback: Readback[StepTag] = Readback(ranks.device)
    pace = Pace(ranks.device)
    saved = progress.step
    unrecorded: Exception | None = None  # what `log` raised, until the next boundary

    def record(line: dict[str, Any]) -> None:
        nonlocal unrecorded
        try:
            log(line)
        except Exception as error:
            unrecorded = unrecorded or error

    def drain(everything: bool = False) -> None:
        for tag, (loss, grad_norm), seconds in readback.ready(drain=everything):
            finite = is_finite(loss) and is_finite(grad_norm)
            if tag.step % options.logging_steps == 0 or tag.step == options.total_steps or not finite:
                record(record_of(tag, loss, grad_norm, seconds, finite))
            progress.nonfinite = count_nonfinite(progress.nonfinite, finite, tag.step, tag.rows)

    def save_now() -> None:
        nonlocal saved
        drain(everything=True)
        save(progress)
        saved = progress.step
        tidy(progress)

    def stopped() -> QLoRAError:
        if unrecorded is not None:
            return explained(unrecorded).adding(_kept(saved))
        return PreemptedError(
            f"stopped on a signal after step {progress.step} of {options.total_steps}; "
            "the state is saved: run the same command to go on"
        )

    def failed_with(error: Exception, undo: Callable[[], None] = lambda: None) -> QLoRAError:
        """The last word of a run that failed, on every rank, after saving what its last step left."""
        known = explained(error)
        try:
            undo()
            if progress.step > saved:
                save_now()
        except Exception as second:
            lost = f"the state after step {progress.step} could not be saved: {explained(second)}"
            return known.adding(lost).adding(f"the last that was saved is that after step {saved}")
        return known.adding(_kept(saved))

    def boundary() -> None:
        """Between two steps: evaluation, a checkpoint, the end of a run that failed or was told to stop."""
        last = progress.step == options.total_steps
        asked = ranks.max(_FAILED if unrecorded is not None else _STOP if stop_requested() else 0)
        if asked == _FAILED and (failure := ranks.failure(unrecorded)):
            raise failed_with(failure) from failure
        stopping = asked == _STOP
        changed = progress.step > saved
        due = last or _due(progress.step, options.eval_steps)
        if evaluate is not None and due and progress.evaluated < progress.step and not stopping:
            drain(everything=True)
            try:
                result = evaluate()
            except Exception as error:
                raise failed_with(error) from error
            if result is None:
                stopping = True
            else:
                changed = True
                record({"step": progress.step, **result})
                if unrecorded is None:  # else it is made again
                    progress.evaluated = progress.step
                    if progress.best_loss is None or result["eval_loss"] < progress.best_loss:
                        progress.best_loss, progress.best_step = result["eval_loss"], progress.step
        if changed and (last or stopping or _due(progress.step, options.save_steps)):
            try:
                save_now()
            except DivergedError:
                raise
            except Exception as error:
                raise explained(error).adding(_kept(saved)) from error
        if stopping:
            raise stopped()

    boundary()  # an evaluation that a signal cut short is made up for
    steps = _steps(loader, progress.epoch, progress.index)
    while progress.step < options.total_steps:
        started = time.monotonic()
        readback.begin()
        epoch, index = progress.epoch, progress.index
        put_back = rng.keep()

        def undo(put_back: Callable[[], None] = put_back) -> None:
            optimizer.zero_grad()
            put_back()

        def give_up(started: float = started) -> bool:
            return stop_requested() and time.monotonic() - started > PATIENCE

        sums: _Sums | None = None
        failure: Exception | None = None
        try:
            step_batch = next(steps)
            scale.fill_(1.0 / max(step_batch.total_weight, 1e-8))
            work = partial(_accumulate, micro_step, step_batch.micro_batches, ranks.device, pace, give_up)
            sums = memory.run(work, undo, f"in step {progress.step + 1}")
        except Exception as error:
            failure = error
        # Before the gradient's, one small sum over all ranks: what was counted, who gave up, who failed.
        counted = (sums.tokens, sums.supervised) if sums is not None else (0, 0)
        counts = ranks.sum_control(torch.tensor([*counted, int(sums is None), int(failure is not None)]))
        tokens, supervised, unfinished, failed = counts.tolist()
        if failed and (failure := ranks.failure(failure)):
            raise failed_with(failure, undo) from failure
        if unfinished:
            undo()  # on every rank: the run is where it was after the last step
            if progress.step > saved:
                save_now()
            raise stopped()
        assert sums is not None

        learning_rate = schedule(progress.step)
        try:
            ranks.sum_(optimizer.grad)
            ranks.sum_(sums.loss)
            poison(optimizer.grad, sums.loss)
            grad_norm = optimizer.step(learning_rate, options.max_grad_norm)
            optimizer.zero_grad()
        except Exception as error:
            half = f"step {progress.step + 1} was half made, its state is not saved"
            raise explained(error).adding(half).adding(_kept(saved)) from error

        per_epoch = loader.steps_per_epoch(epoch)
        progress.step += 1
        progress.epoch, progress.index = (epoch, index + 1) if index + 1 < per_epoch else (epoch + 1, 0)
        progress.tokens += tokens
        progress.supervised += supervised
        tag = StepTag(
            step=progress.step,
            epoch=epoch + (index + 1) / per_epoch,
            learning_rate=learning_rate,
            tokens=tokens,
            supervised=supervised,
            rows=tuple(sums.rows),
            batch=f"{sums.checksum:08x}",
        )
        readback.push(tag, torch.stack((sums.loss * scale, grad_norm.to(sums.loss.dtype))))
        drain()
        boundary()
    if unrecorded is not None:
        raise stopped()
    return progress


_STOP, _FAILED = 1, 2  # what ranks ask of each other at a boundary; the largest counts


def _kept(step: int) -> str:
    return f"the state after step {step} is saved" if step else "no step was saved before"


@dataclass
class _Sums:
    """What one rank's micro-batches of a step add up to, besides the gradient."""

    loss: Tensor
    tokens: int = 0
    supervised: int = 0
    checksum: int = 0
    rows: list[int] = field(default_factory=list)


def _accumulate(
    micro_step: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    device: torch.device,
    pace: Pace,
    give_up: Callable[[], bool],
) -> _Sums | None:
    """Forward and backward of a step; None if it was given up on the way."""
    sums = _Sums(torch.zeros((), device=device))
    for batch in batches:
        if give_up():
            return None
        sums.tokens += batch.n_tokens
        sums.supervised += batch.n_supervised
        sums.checksum = zlib.crc32(batch.input_ids.numpy().tobytes(), sums.checksum)
        sums.rows += batch.rows
        sums.loss += micro_step(batch)
        pace.tick()
    return sums


def _steps(loader: Loader, epoch: int, index: int) -> Iterator[StepBatch]:
    """Batches from a position on, epoch after epoch, prepared ahead by the loader's workers."""
    while True:
        yield from loader.steps(epoch, index)
        epoch, index = epoch + 1, 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
