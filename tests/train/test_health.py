from __future__ import annotations

import random

import pytest
import torch

from qlora_trainer.checkpoint import rng
from qlora_trainer.errors import DivergedError, OutOfMemoryError, is_out_of_memory
from qlora_trainer.train import health


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_poisons_the_gradient(loss: float) -> None:
    grad = torch.randn(5)
    health.poison(grad, torch.tensor(loss))
    assert not torch.isfinite(grad.norm())


def test_a_finite_loss_leaves_the_gradient_bit_for_bit() -> None:
    grad = torch.randn(5)
    before = grad.clone()
    health.poison(grad, torch.tensor(3.5))
    assert torch.equal(grad, before)


def test_three_in_a_row_end_the_run_naming_step_and_rows() -> None:
    count = 0
    for step, finite in enumerate([True, False, False, True, False, False], start=1):
        count = health.count_nonfinite(count, finite, step, [step])
    assert count == 2
    with pytest.raises(DivergedError, match=r"step 7 \(data rows 4, 5\)") as error:
        health.count_nonfinite(count, False, 7, [4, 5])
    assert error.value.exit_code == 3
    with pytest.raises(DivergedError, match=r"0, 1, 2, 3, 4, 5, 6, 7, … 20 in all"):
        health.count_nonfinite(2, False, 7, range(20))


class Work:
    """Draws random numbers and fails the first `failures` times."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error = failures, error
        self.undone = self.calls = 0
        self.put_back = rng.keep()

    def __call__(self) -> list[float]:
        self.calls += 1
        drawn = [random.random(), torch.rand(()).item()]
        if self.calls <= self.failures:
            raise self.error
        return drawn

    def undo(self) -> None:
        self.undone += 1
        self.put_back()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_a_step_that_runs_out_of_memory_is_tried_once_more_with_the_same_draws(error: Exception) -> None:
    released = []
    guard = health.MemoryGuard(torch.device("cpu"), release=lambda: released.append(1))
    torch.manual_seed(0)
    random.seed(0)
    expected = Work(0, error)()
    torch.manual_seed(0)
    random.seed(0)
    work = Work(1, error)
    assert guard.run(work, work.undo, "in step 4") == expected
    assert (work.calls, work.undone, len(released), guard.retried) == (2, 1, 1, 1)


def test_a_second_failure_names_peaks_and_remedies() -> None:
    remedies = ["train.per_device_train_batch_size=1", "train.activations=full", "train.max_length=256"]
    guard = health.MemoryGuard(torch.device("cpu"), planned=3 << 30, remedies=lambda: remedies)
    work = Work(2, OUT_OF_MEMORY[0])
    with pytest.raises(OutOfMemoryError) as error:
        guard.run(work, work.undo, "in step 4")
    assert error.value.exit_code == 2
    assert "step 4" in str(error.value) and "planned peak 3.00 GiB" in str(error.value)
    assert all(remedy in str(error.value) for remedy in remedies)
    assert work.undone == 2


def test_memory_that_ran_out_in_a_graphs_capture_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_other_errors_are_not_retried() -> None:
    guard = health.MemoryGuard(torch.device("cpu"))
    work = Work(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        guard.run(work, work.undo, "in step 1")
    assert work.calls == 1


@pytest.mark.gpu
def test_a_real_allocation_that_fits_after_the_release() -> None:
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info()
    hoard = [torch.empty(int(free * 0.6), dtype=torch.uint8, device=device)]
    guard = health.MemoryGuard(device, release=hoard.clear)
    size = int(free * 0.7)

    def work() -> int:
        return torch.empty(size, dtype=torch.uint8, device=device).numel()

    assert guard.run(work, lambda: None, "in step 1") == size
    with pytest.raises(OutOfMemoryError, match=r"actual peak [\d.]+ of [\d.]+ GiB"):
        guard.run(lambda: torch.empty(4 * free, dtype=torch.uint8, device=device), lambda: None, "in step 1")
