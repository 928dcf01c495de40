"""Pinned memory takes what is asked for, not the next power of two."""

from __future__ import annotations

import pytest

from qlora_trainer.model.fused.activations import pieces

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, 350_000 * 8192, 277_504 * 8192 + 12])
def test_pieces_add_up_and_are_not_rounded(size: int) -> None:
    found = pieces(size)
    assert sum(found) == size and len(found) <= 32
    assert all(piece & (piece - 1) == 0 for piece in found[:-1])
    assert sum(1 << (piece - 1).bit_length() for piece in found) < size + MIB


def test_nothing_takes_no_pieces() -> None:
    assert pieces(0) == [] and pieces(-5) == []
