"""Packs: every document once, never over the count, nearly full, the same for the same seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data import packing
from qlora_trainer.data.packing import best_fit_decreasing, pack


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=200))
def test_each_document_is_in_one_pack_and_none_is_overfull(lengths: list[int]) -> None:
    array = np.asarray(lengths, dtype=np.int32)
    bins = best_fit_decreasing(array, 64)
    assert sorted(place for members in bins for place in members) == list(range(len(lengths)))
    assert all(array[members].sum() <= 64 for members in bins)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_bins_are_those_of_the_textbook(lengths: list[int]) -> None:
    """The same rooms as the quadratic best-fit-decreasing: longest first, into the fullest that holds it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(30 - length)
    array = np.asarray(lengths, dtype=np.int32)
    assert sorted(30 - int(array[members].sum()) for members in best_fit_decreasing(array, 30)) == sorted(
        rooms
    )


def test_instruction_lengths_fill_97_percent_of_2048(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 5000)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.8, 0.8, 20_000).astype(np.int32), 8, 2048)
    documents, starts = pack(lengths, rng.permutation(len(lengths)), 2048, rng)
    assert lengths.sum() / ((len(starts) - 1) * 2048) > 0.97
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    filled = np.add.reduceat(lengths[documents], starts[:-1])
    assert filled.sum() == lengths.sum() and filled.max() <= 2048


def test_a_document_longer_than_a_pack_is_an_invariant_broken() -> None:
    with pytest.raises(AssertionError, match="longer than a pack"):
        best_fit_decreasing(np.asarray([65], dtype=np.int32), 64)
