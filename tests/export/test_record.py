"""`verify.json` keeps the fullest result on the same files, and says what the latest was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_trainer.export.record import store


def found(rows: int, passed: bool = True, digest: str = "d", adapter: str = "a") -> dict[str, Any]:
    models = [{"model": "trained model"}, {"model": "merged", "passed": passed, "sha256": {"w": digest}}]
    size = {"rows": rows, "questions": 0, "max_new_tokens": 0}
    return {"measured_on": f"{rows} rows", "adapter": adapter, **size, "models": models}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_fewer_rows_do_not_replace_more(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    assert store(path, found(64))
    assert not store(path, found(8, passed=False))
    assert read(path) == found(64) | {"latest": found(8, passed=False)}
    assert store(path, found(64))
    assert read(path) == found(64)


def test_a_result_on_other_files_or_of_another_adapter_is_no_result_of_these(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    store(path, found(64))
    assert store(path, found(8, digest="e"))
    assert read(path) == found(8, digest="e")
    store(path, found(64))
    assert store(path, found(8, adapter="b"))
    assert read(path) == found(8, adapter="b")


def test_a_damaged_result_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    path.write_text("{")
    assert store(path, found(8))
    assert read(path) == found(8) and (tmp_path / "verify.json.bad").read_text() == "{"
