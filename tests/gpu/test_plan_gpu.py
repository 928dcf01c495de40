"""The plan is right on a GPU: predicted and measured peak within 5%, policy by policy."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    """scripts/plan_grid with one more shape, large enough for a workspace to be small."""
    path = str(Path(__file__).parents[2] / "scripts" / "plan_grid")
    loader = importlib.machinery.SourceFileLoader("plan_grid", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("plan_grid", loader))
    sys.modules["plan_grid"] = module
    loader.exec_module(module)
    module.SHAPES["small"] = module.llama(2048, 5632, 16, 16, 4, 32000)
    return module


@pytest.fixture(scope="module")
def room(grid: ModuleType):
    return grid.Room()


@pytest.mark.parametrize("policy", ["none", "mlp", "full", "offload"])
def test_peak_is_within_five_percent(grid: ModuleType, room, policy: str) -> None:
    cell = grid.Cell("small", 16, 4, 2048, policy)
    plan = grid.plan_of(cell)
    grid.clear()
    measured = grid.measure(cell, plan, room, steps=1)
    assert plan.phases[1].allocated == pytest.approx(measured.allocated, rel=0.05)
