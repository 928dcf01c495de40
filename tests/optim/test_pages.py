"""Pages travel and come home whole, wherever they live; on a CPU the same code runs without streams."""

from __future__ import annotations

import pytest
import torch

from qlora_trainer.optim.pages import SLOTS, Field, Pages

FIELDS = {
    "master": Field(torch.float32),
    "codes": Field(torch.uint8, fill=127),
    "scale": Field(torch.float32, 256),
}
CPU = torch.device("cpu")
PAGE = 1024
NUMEL = 7 * PAGE + 256  # more pages than slots, and a short one
BYTES = NUMEL * (4 + 1) + NUMEL // 256 * 4


def make(resident_bytes: int | None) -> Pages:
    return Pages(NUMEL, FIELDS, CPU, resident_bytes=resident_bytes, page_elements=PAGE)


def count_up(pages: Pages) -> list[tuple[int, int]]:
    """One pass that adds 1 everywhere; returns what came."""
    came = []
    for page in pages.stream():
        came.append((page.start, page.stop))
        for tensor in page.tensors.values():
            tensor += 1
    return came


@pytest.mark.parametrize("resident", [None, 0, BYTES // 2, BYTES - 1, BYTES])
def test_every_element_comes_once_and_keeps_its_value(resident: int | None) -> None:
    pages = make(resident)
    pages.write("master", 0, torch.arange(NUMEL, dtype=torch.float32))
    for _ in range(3):
        came = count_up(pages)
        assert [start for start, _ in came] == [0, *[stop for _, stop in came[:-1]]]
        assert came[-1][1] == NUMEL
    assert torch.equal(pages.read("master", 0, NUMEL), torch.arange(NUMEL) + 3.0)
    assert (pages.read("codes", 0, NUMEL) == 130).all() and (pages.read("scale", 0, NUMEL) == 3).all()


def test_no_more_stays_than_the_budget() -> None:
    for resident in (0, BYTES // 3, BYTES // 2, BYTES - 1):
        pages = make(resident)
        slots = SLOTS * (PAGE * 5 + PAGE // 256 * 4)
        assert pages.nbytes()["device"] - slots <= resident
        assert sum(pages.nbytes().values()) - slots == BYTES
    assert make(None).nbytes() == make(BYTES).nbytes() == {"device": BYTES, "host": 0}


def test_release_keeps_every_value() -> None:
    pages = make(BYTES // 2)
    pages.write("master", 0, torch.arange(NUMEL, dtype=torch.float32))
    freed = pages.release()
    assert freed > 0 and pages.nbytes()["host"] == BYTES
    assert pages.release() == 0
    count_up(pages)
    assert torch.equal(pages.read("master", 0, NUMEL), torch.arange(NUMEL) + 1.0)


def test_ranges_across_pages_are_read_and_written() -> None:
    pages = make(2 * PAGE * 6)
    values = torch.randn(3 * PAGE)
    pages.write("master", PAGE // 2, values)
    assert torch.equal(pages.read("master", PAGE // 2, PAGE // 2 + 3 * PAGE), values)
    scales = torch.randn(6)
    pages.write("scale", 512, scales)
    assert torch.equal(pages.read("scale", 512, 512 + 6 * 256), scales)
    assert not pages.read("master", 0, PAGE // 2).any()
