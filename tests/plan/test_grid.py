"""The grid's script leaves a table whatever happens to the processes that measure."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import queue
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan_grid"


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("plan_grid", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("plan_grid", loader))
    loader.exec_module(module)
    return module


def measured(index: int, **more: object) -> dict[str, object]:
    return {
        "index": index, "tokens": 100, "length": 50, "policies": "none", "planned": 1 << 30,
        "planned_speed": 90.0, "graphs": False, "allocated": 1 << 30, "reserved": 1 << 30,
        "seconds": 1.0, "update": 0.1, "took": 2.0, "left_behind": 0,
    } | more  # fmt: skip


class Process:
    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


def conduct(grid, monkeypatch, out: Path, indices: list[int], script: list[list], budget: float = 1e4) -> str:
    """The table after processes that say the lines of `script`, a list each; a number is the exit code."""
    asked = []

    class Worker:
        def __init__(self, left: list[int], arguments: argparse.Namespace) -> None:
            asked.append(left)
            self.lines = [*script.pop(0)]
            ends = self.lines.pop() if self.lines and isinstance(self.lines[-1], int) else 0
            self.process = Process(ends)

        def next(self, until: float) -> dict | None:
            line = self.lines.pop(0) if self.lines else None
            if line == "late":
                raise queue.Empty
            return line

        def stop(self) -> None:
            pass

    monkeypatch.setattr(grid, "Worker", Worker)
    table = grid.Table(out)
    grid.conduct(indices, argparse.Namespace(budget=budget, steps=1, rehearse=True), table)
    table.write()
    assert not script, f"not asked for: {script}; asked {asked}"
    return out.read_text()


def test_a_process_that_dies_costs_its_cell_only(grid, monkeypatch, tmp_path) -> None:
    lines = [[{"device": "card"}, {"begins": 0, "seconds": 1}, measured(0), {"begins": 1, "seconds": 1}, -9]]
    lines += [[{"device": "card"}, {"begins": 2, "seconds": 1}, measured(2)]]
    text = conduct(grid, monkeypatch, tmp_path / "t.md", [0, 1, 2], lines)
    assert text.startswith("card") and "the process ended with code -9" in text
    assert text.count("+0.0%") == 3 and "2 cells measured" in text  # two rows and the summary


def test_a_cell_that_leaves_memory_behind_is_followed_by_a_new_process(grid, monkeypatch, tmp_path) -> None:
    lines = [
        [{"begins": 0, "seconds": 1}, measured(0, left_behind=1 << 30)],
        [{"begins": 1, "seconds": 1}, measured(1)],
    ]
    assert "2 cells measured" in conduct(grid, monkeypatch, tmp_path / "t.md", [0, 1], lines)


def test_what_the_budget_does_not_hold_is_named(grid, monkeypatch, tmp_path) -> None:
    lines = [[{"begins": 0, "seconds": 999}], [{"begins": 1, "seconds": 1}, measured(1), "late"]]
    text = conduct(grid, monkeypatch, tmp_path / "t.md", [0, 1, 2], lines, budget=100)
    assert "999 s would not fit" in text and text.count("not run") == 2 and "1 cells measured" in text
    text = conduct(grid, monkeypatch, tmp_path / "t.md", [0, 7], [], budget=1)
    assert text.count("not run: no time left") == 2


def test_the_grid_holds_what_it_promises(grid) -> None:
    names = " ".join(cell.name for cell in grid.CELLS)
    shapes = ["7B", "8B", "13B", "65B", "70B", "r=8 ", "r=16 ", "r=64 ", "x512", "x2048", "x8192", "longest"]
    ways = [
        " none",
        " mlp",
        " full",
        " offload",
        " full_offload",
        "adamw_8bit",
        "offload=layers",
        "fp8",
        "in 24 GiB",
    ]
    for what in shapes + ways:
        assert what in names, what
    assert len({cell.name for cell in grid.CELLS}) == len(grid.CELLS)


def test_a_rehearsal_runs_cells_for_real(tmp_path) -> None:
    line = [sys.executable, str(SCRIPT), "--rehearse", "--steps", "1", "--out", str(tmp_path / "t.md")]
    line += ["--only", "8B r=16 1x512", "longest auto in 24"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    text = (tmp_path / "t.md").read_text()
    assert done.returncode == 0 and "2 cells ran" in text, done.stderr + text
    assert "(longest)" in text and "a rehearsal" in text
