"""The training loop: the one place that calls backward.

In: a `Job`: a micro-step that gives a batch its loss sum and its gradients, a loader that is a pure function
of (epoch, index), an optimizer with a flat gradient buffer, whom to tell. Out: its `Progress`, at the end.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.checkpoint import rng
from qlora_trainer.data.batch import Batch
from qlora_trainer.data.loader import StepBatch
from qlora_trainer.errors import DivergedError, PreemptedError, QLoRAError, explained
from qlora_trainer.train.health import count_nonfinite, poison
from qlora_trainer.train.job import Job, Loader, Progress
from qlora_trainer.train.readback import Pace, Readback
from qlora_trainer.train.record import StepTag, is_finite, record_of

PATIENCE = 5.0  # seconds of a step after which it is undone rather than finished when a run has to stop


def train(job: Job) -> Progress:
    """Trains to the job's last step; its `progress` moves in place.

    Raises:
        DivergedError: loss or gradient was not finite three steps in a row. Such a step leaves
            weights and moments as they were.
        PreemptedError: a stop was requested; the state has been saved.
        QLoRAError: anything else that failed, as `explained`: the message says which state is saved.
    """
    return _Training(job).run()


class _Training:
    """A job at work."""

    def __init__(self, job: Job) -> None:
        self.job, self.progress, self.ranks = job, job.progress, job.ranks
        self.readback: Readback[StepTag] = Readback(job.ranks.device)
        self.pace = Pace(job.ranks.device)
        self.saved = job.progress.step
        self.unrecorded: Exception | None = None  # what `log` raised, until the next boundary

    def run(self) -> Progress:
        job, progress = self.job, self.progress
        self._boundary()  # an evaluation that a signal cut short is made up for
        steps = _steps(job.loader, progress.epoch, progress.index)
        while progress.step < job.total_steps:
            self._step(steps)
            self._boundary()
        if self.unrecorded is not None:
            raise self._stopped()
        return progress

    def _step(self, steps: Iterator[StepBatch]) -> None:
        """One optimizer step: micro-batches, the sum over ranks, the update, the new place of the run."""
        job, progress, ranks = self.job, self.progress, self.ranks
        started = time.monotonic()
        self.readback.begin()
        put_back = rng.keep()

        def undo() -> None:
            job.optimizer.zero_grad()
            put_back()

        sums: _Sums | None = None
        failure: Exception | None = None
        try:
            step_batch = next(steps)
            job.micro_step.scale.fill_(1.0 / max(step_batch.total_weight, 1e-8))
            work = partial(_accumulate, job, step_batch.micro_batches, self.pace, started)
            sums = job.memory.run(work, undo, f"in step {progress.step + 1}")
        except Exception as error:
            failure = error
        # Before the gradient's, one small sum over all ranks: what was counted, who gave up, who failed.
        counted = (sums.tokens, sums.supervised) if sums is not None else (0, 0)
        counts = ranks.sum_control(torch.tensor([*counted, int(sums is None), int(failure is not None)]))
        tokens, supervised, unfinished, failed = counts.tolist()
        if failed and (failure := ranks.failure(failure)):
            raise self._failed_with(failure, undo) from failure
        if unfinished:
            undo()  # on every rank: the run is where it was after the last step
            if progress.step > self.saved:
                self._save()
            raise self._stopped()
        assert sums is not None

        learning_rate = job.schedule(progress.step)
        try:
            ranks.sum_(job.optimizer.grad)
            ranks.sum_(sums.loss)
            poison(job.optimizer.grad, sums.loss)
            grad_norm = job.optimizer.step(learning_rate, job.max_grad_norm)
            job.optimizer.zero_grad()
        except Exception as error:
            half = f"step {progress.step + 1} was half made, its state is not saved"
            raise explained(error).adding(half).adding(_kept(self.saved)) from error

        epoch, index, per_epoch = progress.epoch, progress.index, job.loader.steps_per_epoch(progress.epoch)
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
        mean = sums.loss * job.micro_step.scale
        self.readback.push(tag, torch.stack((mean, grad_norm.to(sums.loss.dtype))))
        self._drain()

    def _boundary(self) -> None:
        """Between two steps: evaluation, a checkpoint, the end of a run that failed or was told to stop."""
        job, progress = self.job, self.progress
        last = progress.step == job.total_steps
        asked = self.ranks.max(
            _FAILED if self.unrecorded is not None else _STOP if job.stop_requested() else 0
        )
        if asked == _FAILED and (failure := self.ranks.failure(self.unrecorded)):
            raise self._failed_with(failure) from failure
        stopping = asked == _STOP
        changed = progress.step > self.saved
        due = last or _due(progress.step, job.eval_steps)
        if job.evaluate is not None and due and progress.evaluated < progress.step and not stopping:
            result = self._evaluate(job.evaluate)
            stopping, changed = result is None, changed or result is not None
        if changed and (last or stopping or _due(progress.step, job.save_steps)):
            try:
                self._save()
            except DivergedError:
                raise
            except Exception as error:
                raise explained(error).adding(_kept(self.saved)) from error
        if stopping:
            raise self._stopped()

    def _evaluate(self, evaluate: Callable[[], dict[str, float] | None]) -> dict[str, float] | None:
        """Evaluates and notes the result; None if it was given up."""
        progress = self.progress
        self._drain(everything=True)
        try:
            result = evaluate()
        except Exception as error:
            raise self._failed_with(error) from error
        if result is None:
            return None
        self._record({"step": progress.step, **result})
        if self.unrecorded is None:  # else it is made again
            progress.evaluated = progress.step
            if progress.best_loss is None or result["eval_loss"] < progress.best_loss:
                progress.best_loss, progress.best_step = result["eval_loss"], progress.step
        return result

    def _record(self, line: dict[str, Any]) -> None:
        try:
            self.job.log(line)
        except Exception as error:
            self.unrecorded = self.unrecorded or error

    def _drain(self, everything: bool = False) -> None:
        """Records the steps whose numbers have arrived on the host."""
        job, progress = self.job, self.progress
        for tag, (loss, grad_norm), seconds in self.readback.ready(drain=everything):
            finite = is_finite(loss) and is_finite(grad_norm)
            if tag.step % job.logging_steps == 0 or tag.step == job.total_steps or not finite:
                self._record(record_of(tag, loss, grad_norm, seconds, finite))
            progress.nonfinite = count_nonfinite(progress.nonfinite, finite, tag.step, tag.rows)

    def _save(self) -> None:
        self._drain(everything=True)
        self.job.save(self.progress)
        self.saved = self.progress.step
        self.job.tidy(self.progress)

    def _stopped(self) -> QLoRAError:
        if self.unrecorded is not None:
            return explained(self.unrecorded).adding(_kept(self.saved))
        return PreemptedError(
            f"stopped on a signal after step {self.progress.step} of {self.job.total_steps}; "
            "the state is saved: run the same command to go on"
        )

    def _failed_with(self, error: Exception, undo: Callable[[], None] = lambda: None) -> QLoRAError:
        """The last word of a run that failed, on every rank, after saving what its last step left."""
        known = explained(error)
        try:
            undo()
            if self.progress.step > self.saved:
                self._save()
        except Exception as second:
            lost = f"the state after step {self.progress.step} could not be saved: {explained(second)}"
            return known.adding(lost).adding(f"the last that was saved is that after step {self.saved}")
        return known.adding(_kept(self.saved))


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


def _accumulate(job: Job, batches: Sequence[Batch], pace: Pace, started: float) -> _Sums | None:
    """Forward and backward of a step that began at `started`; None if it was given up on the way."""
    sums = _Sums(torch.zeros((), device=job.ranks.device))
    for batch in batches:
        if job.stop_requested() and time.monotonic() - started > PATIENCE:
            return None
        sums.tokens += batch.n_tokens
        sums.supervised += batch.n_supervised
        sums.checksum = zlib.crc32(batch.input_ids.numpy().tobytes(), sums.checksum)
        sums.rows += batch.rows
        sums.loss += job.micro_step(batch)
        pace.tick()
    return sums


def _steps(loader: Loader, epoch: int, index: int) -> Iterator[StepBatch]:
    """Batches from a position on, epoch after epoch, prepared ahead by the loader's workers."""
    while True:
        yield from loader.steps(epoch, index)
        epoch, index = epoch + 1, 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
