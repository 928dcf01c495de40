from __future__ import annotations

import time

import pytest
import torch

from qlora_trainer.train import health
from qlora_trainer.train.readback import Pace, Readback


def test_on_a_cpu_numbers_come_out_at_once_and_are_copies() -> None:
    readback: Readback[int] = Readback(torch.device("cpu"))
    values = torch.tensor([1.5, 2.5])
    before = time.perf_counter()
    readback.begin()
    time.sleep(0.02)
    readback.push(1, values)
    after = time.perf_counter()
    values.zero_()
    time.sleep(0.05)  # looked at later, which is not the step's time
    ((tag, numbers, seconds),) = readback.ready()
    assert (tag, numbers) == (1, [1.5, 2.5]) and 0.02 <= seconds <= after - before
    assert readback.ready(drain=True) == []
    Pace(torch.device("cpu")).tick()


@pytest.mark.gpu
def test_on_a_gpu_numbers_come_out_so_many_pushes_later_whatever_has_arrived() -> None:
    readback: Readback[int] = Readback(torch.device("cuda"), depth=2)
    arrived = []
    for step in range(5):
        readback.push(step, torch.full((2,), float(step), device="cuda"))
        torch.cuda.synchronize()  # everything has arrived: the count decides all the same
        arrived.append([tag for tag, *_ in readback.ready()])
    assert arrived == [[], [], [0], [1], [2]]
    assert [entry[:2] for entry in readback.ready(drain=True)] == [(3, [3.0, 3.0]), (4, [4.0, 4.0])]


@pytest.mark.gpu
def test_a_step_takes_what_the_device_took_however_late_its_numbers_are_looked_at() -> None:
    readback: Readback[int] = Readback(torch.device("cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for step in range(2):
        readback.begin()
        start.record()
        torch.cuda._sleep(100_000_000)
        end.record()
        readback.push(step, torch.zeros(1, device="cuda"))
    end.synchronize()
    time.sleep(0.5)
    took = start.elapsed_time(end) / 1e3
    for _, _, seconds in readback.ready(drain=True):
        assert seconds == pytest.approx(took, rel=0.3)


@pytest.mark.gpu
def test_looking_for_numbers_that_are_not_finite_does_not_make_the_host_wait() -> None:
    grad, loss = torch.zeros(10_000_000, device="cuda"), torch.tensor(float("nan"), device="cuda")
    readback: Readback[int] = Readback(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        health.poison(grad, loss)
        readback.push(1, torch.stack((loss, grad[0])))
        assert readback.ready() == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.isfinite(grad.norm())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(100):
        health.poison(grad, loss)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) / 100 < 0.1  # ms; a step of an 8B model takes 20 at the very least


@pytest.mark.gpu
def test_the_host_stays_two_micro_batches_ahead_at_most() -> None:
    pace = Pace(torch.device("cuda"), ahead=2)
    events = []
    for _ in range(6):
        torch.cuda._sleep(50_000_000)
        event = torch.cuda.Event()
        event.record()
        events.append(event)
        pace.tick()
        assert sum(not event.query() for event in events) <= 2
