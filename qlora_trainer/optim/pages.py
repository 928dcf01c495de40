"""Optimizer state in fixed pages that live on the device or in pinned host memory.

In: how many elements there are, which fields each has (master, moments, …) and how many bytes may
stay on the device. Out: `stream()`, which brings the pages to the device for their update and takes
them back, and `read`/`write` for checkpoints.

A page that lives on the host travels through one of three slots on the device: while the page in
one is updated, the next arrives in the second on one copy stream and the last one leaves the third
on another, so the update and both directions of the bus run side by side. No managed (unified)
memory: nothing moves that is not moved here. Page lengths are powers of two because PyTorch's
pinned allocator rounds every request up to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_ELEMENTS = 1 << 21  # 24 MiB of 32-bit state: long enough for the bus's full rate
SLOTS = 3  # arriving, being updated, leaving


@dataclass(frozen=True)
class Field:
    """One tensor of every page: its dtype, how many flat elements share one entry, its first value."""

    dtype: torch.dtype
    elements_per_entry: int = 1
    fill: int = 0

    def entries(self, elements: int) -> int:
        assert elements % self.elements_per_entry == 0
        return elements // self.elements_per_entry


@dataclass
class Page:
    """Flat elements `start` to `stop` and their state by field name."""

    start: int
    stop: int
    tensors: dict[str, Tensor]
    on_host: bool


class Pages:
    """State of `numel` flat elements.

    The first pages stay on the device as far as `resident_bytes` (None: without limit) holds them;
    the others live in pinned host memory. On a CPU all pages are resident and nothing is pinned.
    """

    def __init__(
        self,
        numel: int,
        fields: Mapping[str, Field],
        device: torch.device,
        *,
        resident_bytes: int | None = None,
        page_elements: int = PAGE_ELEMENTS,
    ) -> None:
        assert page_elements & (page_elements - 1) == 0, "page_elements must be a power of two"
        self.fields = dict(fields)
        self.device = device
        self.page_elements = page_elements
        self.pages: list[Page] = []
        resident = 0  # bytes so far
        for start in range(0, numel, page_elements):
            stop = min(start + page_elements, numel)
            resident += self._nbytes(stop - start)
            on_host = device.type == "cuda" and resident_bytes is not None and resident > resident_bytes
            self.pages.append(Page(start, stop, self._new(stop - start, on_host), on_host))
        self._slots: list[dict[str, Tensor]] = []
        if device.type == "cuda":
            self._arrivals = torch.cuda.Stream(device)
            self._departures = torch.cuda.Stream(device)
            self._emptied = [torch.cuda.Event() for _ in range(SLOTS)]
            self._make_slots()

    def _nbytes(self, elements: int) -> int:
        return sum(spec.entries(elements) * spec.dtype.itemsize for spec in self.fields.values())

    def _new(self, elements: int, on_host: bool) -> dict[str, Tensor]:
        device = "cpu" if on_host else self.device
        return {
            name: torch.full(
                (spec.entries(elements),), spec.fill, dtype=spec.dtype, device=device, pin_memory=on_host
            )
            for name, spec in self.fields.items()
        }

    def _make_slots(self) -> None:
        """Allocate the slots before the first update needs them: an update never runs out of memory."""
        if not self._slots and any(page.on_host for page in self.pages):
            self._slots = [self._new(self.page_elements, on_host=False) for _ in range(SLOTS)]
            for stream in (self._arrivals, self._departures):
                stream.wait_stream(torch.cuda.current_stream(self.device))

    def nbytes(self) -> dict[str, int]:
        """Bytes of state by where they are: `device` (slots included) and `host`."""
        where = {"device": len(self._slots) * self._nbytes(self.page_elements), "host": 0}
        for page in self.pages:
            where["host" if page.on_host else "device"] += self._nbytes(page.stop - page.start)
        return where

    def stream(self) -> Iterator[list[Page]]:
        """Pages to update in place, on the device: first all resident ones together, then one by one.

        Every page comes exactly once. The caller enqueues the update of what it is given on the
        current stream before it asks for more.
        """
        resident = [page for page in self.pages if not page.on_host]
        if resident:
            yield resident
        travelling = [page for page in self.pages if page.on_host]
        if not travelling:
            return
        here = torch.cuda.current_stream(self.device)
        # The host runs ahead of the device, so arrivals are enqueued long before their update:
        # what orders the work is only who waits for whom.
        for index, home in enumerate(travelling):
            slot, emptied = self._slots[index % SLOTS], self._emptied[index % SLOTS]
            elements = home.stop - home.start
            visitor = Page(
                home.start,
                home.stop,
                {name: slot[name][: spec.entries(elements)] for name, spec in self.fields.items()},
                on_host=False,
            )
            self._arrivals.wait_event(emptied)
            if index == 0:  # this page may still be leaving through another slot of the last step
                self._arrivals.wait_stream(self._departures)
            with torch.cuda.stream(self._arrivals):
                for name, tensor in home.tensors.items():
                    visitor.tensors[name].copy_(tensor, non_blocking=True)
            here.wait_stream(self._arrivals)
            yield [visitor]
            self._departures.wait_stream(here)
            with torch.cuda.stream(self._departures):
                for name, tensor in home.tensors.items():
                    tensor.copy_(visitor.tensors[name], non_blocking=True)
                emptied.record()

    def release(self) -> int:
        """Move every resident page to pinned host memory; returns the bytes the device has back.

        Waits for the copies. The slots stay, so what comes back is a little less than the pages.
        """
        if self.device.type != "cuda":
            return 0
        before = self.nbytes()["device"]
        for page in self.pages:
            if not page.on_host:
                home = self._new(page.stop - page.start, on_host=True)
                for name, tensor in page.tensors.items():
                    home[name].copy_(tensor)
                page.tensors, page.on_host = home, True
        self._make_slots()
        return before - self.nbytes()["device"]

    def settle(self) -> None:
        """Wait until every page that was away is home, so that the host may read it."""
        if self.device.type == "cuda":
            self._departures.synchronize()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A CPU copy of field `name` for flat elements `start` to `stop` (whole entries)."""
        self.settle()
        return torch.cat([part.cpu() for part, _ in self._parts(name, start, stop)])

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Overwrite field `name` from flat element `start` on with `values` [entries]."""
        self.settle()
        stop = start + values.numel() * self.fields[name].elements_per_entry
        for part, offset in self._parts(name, start, stop):
            part.copy_(values[offset : offset + part.numel()])

    def _parts(self, name: str, start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
        """Views into the pages that make up a flat range, each with its offset in entries."""
        spec = self.fields[name]
        for page in self.pages[start // self.page_elements : -(-stop // self.page_elements)]:
            first, last = max(start, page.start), min(stop, page.stop)
            view = page.tensors[name][spec.entries(first - page.start) : spec.entries(last - page.start)]
            yield view, spec.entries(first - start)
