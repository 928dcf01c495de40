"""Every model type that transformers knows is planned as it runs, or refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import transformers

from tests import families

TABLE = Path(__file__).parents[2] / "scripts" / "families.md"


@pytest.fixture(scope="module")
def table() -> dict[str, str] | None:
    """The committed lines by model type; None under another transformers than they were made with."""
    text = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        return None
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


@pytest.mark.parametrize("model_type", families.TYPES)
def test_every_model_type_is_planned_trained_and_reloaded_or_refused(
    model_type: str, tmp_path, table: dict[str, str] | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = families.outcome(model_type, tmp_path)
    assert found.path in ("fast", "reference", "refused")
    if table is not None:
        assert found.line() == table[model_type], "scripts/families makes the table anew"


def test_the_table_has_every_type(table: dict[str, str] | None) -> None:
    assert table is None or sorted(table) == families.TYPES
