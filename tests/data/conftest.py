"""Small data files, and data made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data import DataOptions, TokenizedData, load_tokenized
from tests.data.families import tokenizer

ROWS = [
    {
        "instruction": f"Say {'one two three ' * (n % 7)}{n}",
        "output": f"well {'four five ' * (n * 5 % 11)}{n}",
    }
    for n in range(60)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., TokenizedData]:
    """`load(path, **options)` with the Qwen3-like tokenizer and a cache of the test's own."""

    def loaded(
        path: Any, *, max_length: int = 128, seed: int = 0, role: str = "train", **options: Any
    ) -> TokenizedData:
        given = DataOptions(path=str(path) if isinstance(path, Path) else path, **options)
        return load_tokenized(
            given,
            tokenizer("qwen3"),
            max_length=max_length,
            seed=seed,
            role=role,
            cache_dir=tmp_path / "cache",
        )

    return loaded
