"""What can go wrong inside a step, and what is done about it: not-finite numbers and memory.

Not finite: the optimizer leaves weights and moments untouched when the gradient norm is not finite,
decided on the device. `poison` makes a loss that is not finite have that effect too. The host learns
of it when the step's numbers arrive (`readback`), so detection costs no synchronisation, and
`count_nonfinite` ends the run after three in a row.

Out of memory: `MemoryGuard` runs the part of a step that allocates; when it does not fit, everything
that can leave the device does, and it runs once more from the same random state. A batch is never changed
to make it fit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qlora_trainer.errors import DivergedError, OutOfMemoryError, is_out_of_memory, one_line

T = TypeVar("T")
MAX_IN_A_ROW = 3
GIB = 1 << 30


def poison(grad: Tensor, loss: Tensor) -> None:
    """Makes a flat gradient not finite if the loss is not, in place and on the device.

    A loss can be infinite while every gradient is finite (the derivative of a saturated term is 0);
    such a step must not reach the weights either. Otherwise adds a zero to one element.

    Args:
        grad: float32 [n], n > 0.
        loss: float32 scalar on the same device.
    """
    grad[:1].add_(loss.detach() * 0.0)


def count_nonfinite(in_a_row: int, finite: bool, step: int, rows: Sequence[int]) -> int:
    """Steps in a row, up to this one, that were not finite; called for every step in order.

    Args:
        in_a_row: the count up to the step before; part of the run's state.

    Raises:
        DivergedError: `MAX_IN_A_ROW` is reached, naming the step and the rows of its batch.
    """
    if finite:
        return 0
    if in_a_row + 1 < MAX_IN_A_ROW:
        return in_a_row + 1
    shown = ", ".join(map(str, rows[:8])) + (f", … {len(rows)} in all" if len(rows) > 8 else "")
    raise DivergedError(
        f"loss or gradient was not finite {MAX_IN_A_ROW} steps in a row, up to step {step} "
        f"(data rows {shown}); the weights are those of the last finite step: "
        "lower train.learning_rate, or look at these rows with `inspect`"
    )


class MemoryGuard:
    """Runs work that may run out of memory, twice at most.

    Args:
        device: whose memory it is.
        release: called before the second try: pages, workspaces, cached activations leave the device.
        planned: the plan's peak in bytes, if there is one.
        remedies: asked only when it fails: `key=value` settings that need less, the mildest first.
    """

    def __init__(
        self,
        device: torch.device,
        release: Callable[[], object] = lambda: None,
        planned: int | None = None,
        remedies: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.device = device
        self.release = release
        self.planned = planned
        self.remedies = remedies
        self.retried = 0

    def run(
        self,
        work: Callable[[], T],
        undo: Callable[[], None],
        when: str,
        remedies: Sequence[str] | None = None,
    ) -> T:
        """`work()`, or its second try after `undo()`, which leaves everything as before the first.

        Args:
            when: for the message: `in step 3`.
            remedies: what helps here, if not what helps a step.

        Raises:
            OutOfMemoryError: the second try did not fit either; `undo` has been called again, so the
                state at the last boundary can be saved.
        """
        reason = ""
        for attempt in range(2):
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            # Outside the handler: the traceback's frames held the activations.
            undo()
            if attempt == 0:
                self.retried += 1
                self.release()
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        raise OutOfMemoryError(
            self._complaint(when, reason, self.remedies() if remedies is None else remedies)
        )

    def _complaint(self, when: str, reason: str, remedies: Sequence[str]) -> str:
        peak = []
        if self.planned is not None:
            peak.append(f"planned peak {self.planned / GIB:.2f} GiB")
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            actual = torch.cuda.max_memory_reserved(self.device)
            peak.append(f"actual peak {actual / GIB:.2f} of {total / GIB:.2f} GiB")
        where = ", ".join(peak) or reason
        text = f"out of memory {when}, also after freeing what could be freed ({where})"
        less = "; or ".join(remedies)
        return f"{text}; the batch is as you set it; to need less, set {less}" if less else text
