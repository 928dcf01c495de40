"""The rehearsal: what will need most memory runs once before step 1, so that it fails now or never.

In: the heaviest micro-batch and the widest held-out one. Out: the peak in bytes. Gradients and random
number generators are put back exactly; a run with a rehearsal ends with the bytes of one without.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_trainer.checkpoint import rng
from qlora_trainer.data.batch import Batch
from qlora_trainer.train.health import MemoryGuard
from qlora_trainer.train.job import Optimizer


def rehearse(
    micro_step: Callable[[Batch], Tensor],
    heaviest: Batch,
    evaluate: Callable[[Batch], Tensor],
    held_out: Batch | None,
    optimizer: Optimizer,
    memory: MemoryGuard,
) -> int:
    """Runs a forward and backward, and an evaluation; returns the peak in device bytes (0 on a CPU).

    Args:
        evaluate: batch -> loss sum, in evaluation mode.
        held_out: None if nothing is evaluated.

    Raises:
        OutOfMemoryError: it does not fit, also after the optimizer's pages have left the device.
    """
    put_back = rng.keep()

    def undo() -> None:
        optimizer.zero_grad()
        put_back()

    def work() -> None:
        micro_step(heaviest)
        if held_out is not None:
            with torch.no_grad():
                evaluate(held_out)
        if memory.device.type == "cuda":
            torch.cuda.synchronize(memory.device)

    memory.run(work, undo, "in step 1")
    undo()
    return torch.cuda.max_memory_allocated(memory.device) if memory.device.type == "cuda" else 0


def widest(batches: list[Batch]) -> Batch | None:
    """The batch with the most tokens, padding included."""
    return max(batches, key=lambda batch: batch.input_ids.numel(), default=None)
