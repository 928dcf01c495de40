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
from itertools import pairwise

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


class _Lane:
    """Work in order on a device: a stream of its own for copies. On a CPU everything is over at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        return self._own

    def wait(self, other: _Lane) -> None:
        """Nothing enqueued from now on starts before all that is enqueued on `other`."""
        if self.stream is not None and other.stream is not None:
            self.stream.wait_stream(other.stream)

    def mark(self) -> torch.cuda.Event | None:
        """An event at the end of what is enqueued now."""
        return self.stream.record_event() if self.stream is not None else None

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)

    def copy(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        with torch.cuda.stream(self.stream):  # without effect for None
            for name, tensor in source.items():
                target[name].copy_(tensor, non_blocking=True)

    def settle(self) -> None:
        """The host waits until all is done."""
        if self.stream is not None:
            self.stream.synchronize()


class _Here(_Lane):
    """The stream that is current whenever it is asked."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None


class Pages:
    """State of `numel` flat elements.

    The first pages stay on the device as far as `resident_bytes` (None: without limit) holds them;
    the others live in pinned host memory. On a CPU both are ordinary memory and pages travel at once.
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
        stays = numel
        if resident_bytes is not None:
            whole = min(resident_bytes, self._nbytes(numel)) // self._nbytes(page_elements)
            stays = numel if resident_bytes >= self._nbytes(numel) else whole * page_elements
        # What stays is one long page: one launch updates it.
        self.pages = [Page(0, stays, self._new(stays, on_host=False), on_host=False)] if stays else []
        self.pages += self._on_host(stays, numel)
        self._slots: list[dict[str, Tensor]] = []
        self._arrivals, self._departures = _Lane(device), _Lane(device)
        self._here = _Here(device)
        self._make_slots()

    def _nbytes(self, elements: int) -> int:
        return sum(spec.entries(elements) * spec.dtype.itemsize for spec in self.fields.values())

    def _new(self, elements: int, on_host: bool) -> dict[str, Tensor]:
        device = "cpu" if on_host else self.device
        return {
            name: torch.full(
                (spec.entries(elements),),
                spec.fill,
                dtype=spec.dtype,
                device=device,
                pin_memory=on_host and self.device.type == "cuda",
            )
            for name, spec in self.fields.items()
        }

    def _on_host(self, start: int, stop: int) -> list[Page]:
        """New pages in pinned memory for elements `start` to `stop`."""
        borders = [*range(start, stop, self.page_elements), stop]
        return [
            Page(first, last, self._new(last - first, on_host=True), on_host=True)
            for first, last in pairwise(borders)
        ]

    def _make_slots(self) -> None:
        """Allocate the slots before the first update needs them: an update never runs out of memory."""
        if not self._slots and any(page.on_host for page in self.pages):
            self._slots = [self._new(self.page_elements, on_host=False) for _ in range(SLOTS)]
            self._arrivals.wait(self._here)
            self._emptied = [self._arrivals.mark() for _ in self._slots]

    def nbytes(self) -> dict[str, int]:
        """Bytes of state by where they are: `device` (slots included) and `host`."""
        where = {"device": len(self._slots) * self._nbytes(self.page_elements), "host": 0}
        for page in self.pages:
            where["host" if page.on_host else "device"] += self._nbytes(page.stop - page.start)
        return where

    def stream(self) -> Iterator[Page]:
        """Pages to update in place, on the device: what stays there first, then what travels, one by one.

        Every element comes exactly once. The caller enqueues the update of the page it is given on the
        current stream before it asks for the next.
        """
        yield from (page for page in self.pages if not page.on_host)
        travelling = [page for page in self.pages if page.on_host]
        if not travelling:
            return
        self._arrivals.wait(self._departures)  # a page may still be leaving through another slot
        # The host runs ahead of the device, so arrivals are enqueued long before their update:
        # what orders the work is only who waits for whom.
        for index, home in enumerate(travelling):
            slot, elements = index % SLOTS, home.stop - home.start
            visitor = {
                name: self._slots[slot][name][: spec.entries(elements)] for name, spec in self.fields.items()
            }
            self._arrivals.wait_for(self._emptied[slot])
            self._arrivals.copy(home.tensors, visitor)
            self._here.wait(self._arrivals)
            yield Page(home.start, home.stop, visitor, on_host=False)
            self._departures.wait(self._here)
            self._departures.copy(visitor, home.tensors)
            self._emptied[slot] = self._departures.mark()

    def release(self) -> int:
        """Move what is on the device to pinned host memory; returns the bytes the device has back.

        Waits for the copies. The slots are new, so what comes back is a little less than the state.
        """
        before = self.nbytes()["device"]
        if self.pages and not self.pages[0].on_host:
            resident = self.pages.pop(0)
            homes = self._on_host(resident.start, resident.stop)
            for home in homes:
                for name, tensor in home.tensors.items():
                    tensor.copy_(self._view(resident, name, home.start, home.stop))
            self.pages = homes + self.pages
            del resident
        self._make_slots()
        return before - self.nbytes()["device"]

    def _view(self, page: Page, name: str, start: int, stop: int) -> Tensor:
        """The entries of a page's field for flat elements `start` to `stop`, which lie within it."""
        spec = self.fields[name]
        return page.tensors[name][spec.entries(start - page.start) : spec.entries(stop - page.start)]

    def settle(self) -> None:
        """Wait until every page that was away is home, so that the host may read it."""
        self._departures.settle()

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
        for page in self.pages:
            first, last = max(start, page.start), min(stop, page.stop)
            if first < last:
                yield self._view(page, name, first, last), self.fields[name].entries(first - start)
