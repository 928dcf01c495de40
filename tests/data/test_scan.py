"""Reading and checking rows needs no torch, happens once, and joins trees that are kept a message a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data import DataOptions, scan
from qlora_trainer.data.example import Example
from qlora_trainer.data.options import Source
from qlora_trainer.data.problems import Problem
from qlora_trainer.data.scan import RowSplit, SourceReader, check_rows
from qlora_trainer.data.sources import open_source
from qlora_trainer.errors import CheckpointError, DataError
from tests.data.conftest import ROWS, write_jsonl


def read(path: Path, **options: Any) -> list[Example | Problem]:
    source = Source(path=str(path), **options)
    return [example for _, example in SourceReader(source, open_source(source), RowSplit(0.0, 0, "train"))]


def message(
    name: str, parent: str | None, role: str, rank: int | None = None, tree: str = "t"
) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "message_tree_id": tree,
        "text": name,
        "role": role,
        "rank": rank,
    }


TREE = [
    message("q", None, "prompter"),
    message("worse", "q", "assistant", 1),
    message("better", "q", "assistant", 0),
    message("more", "better", "prompter"),
    message("last", "more", "assistant", 0),
]


def test_oasst_messages_are_joined_into_their_best_path(tmp_path: Path) -> None:
    other = [message("q2", None, "prompter", tree="u"), message("a2", "q2", "assistant", tree="u")]
    first, second = read(write_jsonl(tmp_path / "a.jsonl", TREE + other))
    assert isinstance(first, Example) and isinstance(second, Example)
    assert [turn.content for turn in first.messages] == ["q", "better", "more", "last"]
    assert [turn.content for turn in second.messages] == ["q2", "a2"]


def test_a_tree_with_a_lost_message_is_one_bad_row(tmp_path: Path) -> None:
    lost = [row for row in TREE if row["message_id"] != "better"]
    [problem] = read(write_jsonl(tmp_path / "a.jsonl", lost), format="oasst")
    assert problem == Problem("parent_id", "'better' is not a message of this tree")


def test_bad_rows_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"instruction": "a", "output": 1}])
    program = (
        "import sys\nfrom qlora_trainer.data.options import DataOptions\n"
        "from qlora_trainer.data.scan import check_rows\n"
        f"try:\n    check_rows(DataOptions(path={str(path)!r}), seed=0)\n"
        "except Exception as error:\n    print(error)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "a.jsonl:61: output: expected text, found a number" in done.stdout


def test_rows_that_were_checked_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    options = DataOptions(path=str(path), eval_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    check_rows(options, seed=0)
    opened = [open_source(source) for source in options.sources("train")]
    found = scan.scan(options, opened, role="train", seed=0)
    monkeypatch.setattr(scan, "_read_all", None)
    check_rows(options, seed=0)
    assert scan.scan(options, opened, role="train", seed=0) == found and found.formats == ["alpaca"]
    with pytest.raises(TypeError):
        check_rows(options, seed=1)
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(TypeError):
        check_rows(options, seed=0)


def test_a_cache_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"set data\.cache_dir"):
        check_rows(DataOptions(path=str(path), cache_dir=str(tmp_path / "file" / "cache")), seed=0)


def test_duplicate_ids_are_told_with_the_file_they_are_in(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{**ROWS[0], "id": "x"}])
    write_jsonl(folder / "b.jsonl", [ROWS[1], {**ROWS[2], "id": "x"}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: id: the same as in .*a\.jsonl:1"):
        check_rows(DataOptions(path=str(folder), cache_dir=str(tmp_path / "cache")), seed=0)


def test_numbers_that_number_the_rows_of_a_shard_may_repeat_but_equal_rows_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{**row, "id": at} for at, row in enumerate(ROWS[:3])])
    write_jsonl(folder / "b.jsonl", [{**row, "id": str(at)} for at, row in enumerate(ROWS[3:6])])
    write_jsonl(folder / "c.jsonl", [{**ROWS[6], "id": -1}, {**ROWS[7], "id": -2}])  # equal in Python's hash
    options = DataOptions(path=str(folder), cache_dir=str(tmp_path / "cache"))
    check_rows(options, seed=0)
    write_jsonl(folder / "d.jsonl", [{**ROWS[1], "id": 1}])
    with pytest.raises(DataError, match=r"d\.jsonl:1: id: the same as in .*a\.jsonl:2"):
        check_rows(options, seed=0)


def test_rows_of_one_line_are_told_by_their_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ROWS[:12], {"instruction": "a", "output": 1}]))
    with pytest.raises(DataError, match=r"a\.json:1\[12\]: output: expected text, found a number"):
        check_rows(DataOptions(path=str(path), cache_dir=str(tmp_path / "cache")), seed=0)


def test_a_file_without_rows_beside_others_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl").write_text("\n")
    options = DataOptions(path=str(folder), cache_dir=str(tmp_path / "cache"))
    opened = [open_source(source) for source in options.sources("train")]
    assert scan.scan(options, opened, role="train", seed=0).remarks == [
        f"{folder / 'b.jsonl'}: empty: no rows"
    ]
