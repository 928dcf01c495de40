"""A recipe's held-out rows and task are left behind by whoever names other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.config.load import load
from qlora_trainer.config.schema import RunConfig

TASK = """\
model: {model_name_or_path: m}
data: {path: mine, eval_path: [held, other], format: alpaca}
evaluate: {task: exact_match, eval_steps: 10, max_rows: 7}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "task.yaml").write_text(TASK)
    (tmp_path / "recipes" / "heir.yaml").write_text("defaults: [task, _self_]\ndata: {path: its}\n")


def composed(*arguments: str) -> tuple[RunConfig, list[str]]:
    lines: list[str] = []
    return load(arguments, say=lines.append), lines


@pytest.mark.parametrize("arguments", [["recipe=task", "data.path=new"], ["recipe=heir"]])
def test_other_data_do_not_inherit_held_out_rows_nor_task(arguments: list[str]) -> None:
    config, lines = composed(*arguments)
    assert (config.data.eval_path, config.evaluate.task, config.evaluate.eval_steps) == (None, "none", 0)
    assert (config.data.format, config.evaluate.max_rows) == ("alpaca", 7)
    assert lines == [
        "data.path is not the recipe's, so its data.eval_path and evaluate.task and evaluate.eval_steps "
        "do not apply; to hold rows out, give data.eval_path=FILE or data.eval_fraction=0.05"
    ]


def test_a_fraction_of_the_other_data_keeps_what_any_rows_serve() -> None:
    config, lines = composed("recipe=task", "data.path=new", "data.eval_fraction=0.1")
    assert (config.data.eval_path, config.evaluate.task, config.evaluate.eval_steps) == (None, "none", 10)
    assert lines == ["data.path is not the recipe's, so its data.eval_path and evaluate.task do not apply"]


def test_what_the_line_itself_says_applies() -> None:
    config, lines = composed("recipe=task", "data.path=new", "data.eval_path=kept", "evaluate.eval_steps=5")
    assert (config.data.eval_path, config.evaluate.task, config.evaluate.eval_steps) == (
        "kept",
        "exact_match",
        5,
    )
    assert lines == []
    config, lines = composed(
        "recipe=task", "data.path=new", "data.eval_fraction=0.1", "evaluate.task=exact_match"
    )
    assert config.evaluate.task == "exact_match" and len(lines) == 1


def test_the_recipes_own_data_keep_them() -> None:
    for arguments in (["recipe=task"], ["recipe=task", "data.path=mine"]):
        config, lines = composed(*arguments)
        assert config.data.eval_path == ["held", "other"] and lines == []


def test_a_run_keeps_its_rows_whatever_data_a_command_reads(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.yaml").write_text(TASK)
    lines: list[str] = []
    config = load(["run=done", "data.path=new"], "evaluate", say=lines.append)
    assert config.data.eval_path == ["held", "other"] and lines == []
