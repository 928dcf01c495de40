"""The loader is a function of (seed, epoch, index): no row twice, none missing, in every world size."""

from __future__ import annotations

import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qlora_trainer.data import IGNORE, Batch, Loader, TokenizedData
from qlora_trainer.data.loader import StepBatch
from qlora_trainer.errors import ConfigError

PAD = 0
LAYOUTS = {"padded": {}, "packed": {"packing": True}, "grouped": {"group_by_length": True}}


@pytest.fixture
def data(load: Callable[..., TokenizedData], rows_file: Path) -> TokenizedData:
    return load(rows_file)


def loader(data: TokenizedData, **changes: Any) -> Loader:
    settings: dict[str, Any] = {
        "micro_batch_size": 2,
        "accumulation": 3,
        "max_length": 128,
        "packing": False,
        "group_by_length": False,
        "seed": 1,
        "pad_id": PAD,
    }
    return Loader(data, **(settings | changes))


def same(a: Batch, b: Batch) -> bool:
    return a.rows == b.rows and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "labels", "loss_weights", "position_ids", "document_ids")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_once_in_every_world_size(data: TokenizedData, layout: str, world_size: int) -> None:
    ranks = [loader(data, rank=rank, world_size=world_size, **LAYOUTS[layout]) for rank in range(world_size)]
    assert len({rank.fingerprint for rank in ranks}) == 1
    seen: Counter[int] = Counter()
    for index in range(ranks[0].steps_per_epoch(0)):
        steps = [rank.step(0, index) for rank in ranks]
        assert len({len(step.micro_batches) for step in steps}) == 1, "each rank has as many micro-batches"
        weight = sum(float(batch.loss_weights.sum()) for step in steps for batch in step.micro_batches)
        assert all(step.total_weight == pytest.approx(weight) for step in steps)
        seen.update(row for step in steps for batch in step.micro_batches for row in batch.rows)
    assert seen == dict.fromkeys(range(len(data)), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_share_the_micro_batches_of_one_process(data: TokenizedData, layout: str) -> None:
    one = loader(data, accumulation=6, **LAYOUTS[layout])
    two = [loader(data, accumulation=3, rank=rank, world_size=2, **LAYOUTS[layout]) for rank in range(2)]
    assert one.fingerprint == two[0].fingerprint
    for index in range(one.steps_per_epoch(0)):
        alone = one.step(0, index).micro_batches
        shared = [rank.step(0, index).micro_batches for rank in two]
        woven = [batch for pair in zip(*shared, strict=True) for batch in pair if batch.rows]
        assert len(woven) == len(alone) and all(same(a, b) for a, b in zip(alone, woven, strict=True))


def test_a_rank_without_work_gets_a_batch_that_teaches_nothing(data: TokenizedData) -> None:
    world = 7
    ranks = [loader(data, rank=rank, world_size=world, accumulation=1) for rank in range(world)]
    last = ranks[0].steps_per_epoch(0) - 1
    idle = [batch for rank in ranks for batch in rank.step(0, last).micro_batches if not batch.rows]
    assert idle, "the test needs a last step that does not divide"
    for batch in idle:
        assert (batch.labels == IGNORE).all() and (batch.loss_weights == 0).all()
        assert (batch.document_ids >= 0).any(), "real tokens, so that no attention row is empty"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_depends_on_nothing_but_seed_epoch_and_index(data: TokenizedData, layout: str) -> None:
    first, second = loader(data, **LAYOUTS[layout]), loader(data, **LAYOUTS[layout])
    list(first.steps(0))  # any history
    for epoch, index in ((3, 2), (0, 1)):
        a, b = first.step(epoch, index), second.step(epoch, index)
        assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    rows = [
        [
            batch.rows
            for step in loader(data, **LAYOUTS[layout], **other).steps(epoch)
            for batch in step.micro_batches
        ]
        for other, epoch in (({}, 0), ({}, 1), ({"seed": 2}, 0))
    ]
    assert rows[0] != rows[1] and rows[0] != rows[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_steps_from_any_start(data: TokenizedData, workers: int) -> None:
    ours = loader(data, num_workers=workers, packing=True)
    for start in (0, 1):
        expected = [ours.step(1, index) for index in range(start, ours.steps_per_epoch(1))]
        given = list(ours.steps(1, start))
        assert len(given) == len(expected)
        for a, b in zip(given, expected, strict=True):
            assert a.total_weight == b.total_weight
            assert all(same(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


def test_workers_are_no_processes_and_end_with_the_epoch(data: TokenizedData) -> None:
    """A process could be killed alone, and could not start where /dev/shm is full."""
    before = threading.active_count()
    for taken in (1, None):
        steps = loader(data, num_workers=2, micro_batch_size=1, accumulation=1).steps(0)
        next(steps)
        assert multiprocessing.active_children() == [] and psutil.Process().children() == []
        assert any(thread.name.startswith("batches") for thread in threading.enumerate())
        steps.close() if taken else list(steps)  # type: ignore[attr-defined]
        assert threading.active_count() == before


def test_what_a_worker_raises_is_raised_where_the_step_is_asked_for(data: TokenizedData) -> None:
    """And not before: the steps that were made are given first, as without workers."""
    for workers in (0, 2):
        ours = loader(data, num_workers=workers, micro_batch_size=1, accumulation=1)
        made = ours.step

        def step(epoch: int, index: int, made: Any = made) -> StepBatch:
            if index == 3:
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
            return made(epoch, index)

        ours.step = step  # type: ignore[method-assign]
        steps = ours.steps(0)
        assert [next(steps).micro_batches[0].rows for _ in range(3)]
        with pytest.raises(UnicodeDecodeError):
            next(steps)


def test_batch_holds_the_documents_as_the_contract_says(data: TokenizedData) -> None:
    batches = [batch for step in loader(data, packing=True).steps(0) for batch in step.micro_batches]
    assert any(batch.packed for batch in batches)
    for batch in batches:
        assert batch.input_ids.shape[1] == 128, "packs have a fixed token count"
        rows = iter(batch.rows)
        for row in range(len(batch.input_ids)):
            at = 0
            for number in range(int(batch.document_ids[row].max()) + 1):
                document = data.document(next(rows))
                span = slice(at, at + len(document.ids))
                assert batch.input_ids[row, span].tolist() == document.ids.tolist()
                assert batch.position_ids[row, span].tolist() == list(range(len(document.ids)))
                assert (batch.document_ids[row, span] == number).all()
                assert batch.loss_weights[row, span].tolist() == document.weights.tolist()
                at = span.stop
            assert (batch.document_ids[row, at:] == -1).all() and (batch.input_ids[row, at:] == PAD).all()
            assert (batch.position_ids[row, at:] == 0).all() and (batch.loss_weights[row, at:] == 0).all()
        supervised = batch.loss_weights > 0
        assert torch.equal(batch.labels[supervised], batch.input_ids[supervised])
        assert (batch.labels[~supervised] == IGNORE).all()
        assert (batch.labels[batch.position_ids == 0] == IGNORE).all(), "no first token is predicted"


def test_grouping_by_length_saves_padding(data: TokenizedData) -> None:
    def padding(**layout: bool) -> int:
        return sum(
            int((b.document_ids < 0).sum()) for s in loader(data, **layout).steps(0) for b in s.micro_batches
        )

    assert padding(group_by_length=True) < padding() / 2


@pytest.mark.parametrize("layout", [{}, {"group_by_length": True}, {"packing": True}])
def test_the_widest_row_is_known_before_any_epoch(data: TokenizedData, layout: dict[str, bool]) -> None:
    """Whichever row a micro-batch has: shapes that are rounded up to it must not change with the epoch."""
    rows = loader(data, **layout)
    assert [int(rows.widths(epoch).max()) for epoch in range(3)] == [rows.longest] * 3
    assert {b.input_ids.shape[1] for s in rows.steps(0) for b in s.micro_batches} <= set(
        range(rows.longest + 1)
    )


def test_weights_of_sources_repeat_and_thin_out_rows(
    load: Callable[..., TokenizedData], rows_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(rows_file.read_text().replace("Say", "Tell"))
    data = load([{"path": str(rows_file), "weight": 2}, {"path": str(other), "weight": 0.5}])
    seen = [
        Counter(r for s in loader(data).steps(epoch) for b in s.micro_batches for r in b.rows)
        for epoch in (0, 1)
    ]
    for counts in seen:
        assert all(counts[row] == 2 for row in range(60))
        assert 15 <= sum(counts[row] for row in range(60, 120)) <= 45
    assert seen[0] != seen[1], "another half each epoch"


def test_fingerprint_tells_the_order_apart(data: TokenizedData) -> None:
    prints = {
        loader(data, **changes).fingerprint
        for changes in (
            {},
            {"seed": 2},
            {"packing": True},
            {"group_by_length": True},
            {"micro_batch_size": 3},
            {"accumulation": 4},
        )
    }
    assert len(prints) == 6


def test_wrong_settings_are_refused(data: TokenizedData) -> None:
    with pytest.raises(ConfigError, match="group_by_length"):
        loader(data, packing=True, group_by_length=True)
    with pytest.raises(ConfigError, match="max_length=64"):
        loader(data, max_length=64)
    with pytest.raises(IndexError):
        loader(data).step(0, 10_000)
