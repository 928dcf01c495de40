"""Held-out documents that are trained on are counted, and a held-out set of nothing else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.data import TokenizedData
from qlora_trainer.data.overlap import check, shared_documents
from qlora_trainer.errors import DataError
from tests.data.conftest import ROWS, write_jsonl

Load = Callable[..., TokenizedData]


def test_documents_are_compared_whatever_their_file_and_id(load: Load, tmp_path: Path) -> None:
    train = load(write_jsonl(tmp_path / "a.jsonl", [{**row, "id": at} for at, row in enumerate(ROWS)]))
    new = {"instruction": "Say nothing", "output": "nothing"}
    held = load(write_jsonl(tmp_path / "b.jsonl", [*ROWS[5:8], new]))
    assert shared_documents(train, held) == 3
    assert check(train, [held], given=True) == [
        "3 of 4 held-out documents are training documents too: they measure memory"
    ]
    fresh = load(write_jsonl(tmp_path / "c.jsonl", [new]))
    assert shared_documents(train, fresh) == 0 and check(train, [fresh], given=True) == []
    assert check(train, [], given=True) == []
    again = load(write_jsonl(tmp_path / "d.jsonl", ROWS[5:8]))
    with pytest.raises(
        DataError, match=r"data\.eval_path: all 3 held-out documents.*data\.eval_fraction=0\.1"
    ):
        check(train, [again], given=True)
    assert len(check(train, [again, fresh], given=True)) == 1
    assert len(check(train, [again], given=False)) == 1


def test_a_fraction_of_rows_shares_none(load: Load, rows_file: Path) -> None:
    parts = [load(rows_file, eval_fraction=0.3, role=role) for role in ("train", "eval")]
    assert shared_documents(*parts) == 0
