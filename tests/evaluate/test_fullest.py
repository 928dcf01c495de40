"""A quick look never takes the place of a full measurement, nor hides behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.evaluate.fullest import fullest, read_results


def found(rows: int | None, questions: int = 0, model: str = "a") -> dict[str, Any]:
    return {"model": model, "rows": rows, "questions": questions}


def stored(*results: dict[str, Any]) -> dict[str, Any]:
    kept: Any = None
    for result in results:
        kept = fullest(kept, result, same=("model",), size=("rows", "questions"))
    return kept


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([found(100), found(10)], found(100) | {"latest": found(10)}),
        ([found(10), found(100)], found(100)),
        ([found(10), found(10)], found(10)),
        ([found(100), found(10), found(20)], found(100) | {"latest": found(20)}),
        ([found(100), found(10), found(100)], found(100)),
        ([found(100, 5), found(200, 0)], found(100, 5) | {"latest": found(200, 0)}),
        ([found(None), found(10)], found(None) | {"latest": found(10)}),
        ([found(10), found(None)], found(None)),
        ([found(100), found(10, model="b")], found(10, model="b")),
    ],
)
def test_the_fullest_stands_and_the_latest_is_beside_it(
    results: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    assert stored(*results) == expected


@pytest.mark.parametrize("earlier", [None, 5, [], {}, {"model": "a", "rows": "many"}, {"rows": 10**9}])
def test_what_is_no_result_goes(earlier: Any) -> None:
    assert fullest(earlier, found(1), same=("model",), size=("rows",)) == found(1)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"null", b"[1]", b"\xff", b"[" * 100_000])
def test_a_file_that_holds_no_results_is_put_aside_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evaluation.json"
    said: list[str] = []
    assert read_results(path, said.append) == {} and said == []
    path.write_bytes(content)
    assert read_results(path, said.append) == {}
    assert said == ["evaluation.json: holds no results, and is kept as evaluation.json.bad"]
    assert (tmp_path / "evaluation.json.bad").read_bytes() == content and not path.exists()
