"""The plan is right on a GPU: predicted and measured peak within 5%, policy by policy."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    """The plan grid's cells with one more shape, large enough for a workspace to be small."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    module = importlib.import_module("plan_grid_cell")
    module.SHAPES["small"] = module.llama(2048, 5632, 16, 16, 4, 32000)
    return module


@pytest.fixture(scope="module")
def room(grid: ModuleType):
    return grid.Room(grid.Device("cuda"))


@pytest.mark.parametrize("base_gemm", ["bf16", "fp8"])
@pytest.mark.parametrize("policy", ["none", "mlp", "full", "offload", "full_offload"])
def test_peak_is_within_five_percent(grid: ModuleType, room, policy: str, base_gemm: str) -> None:
    asked = grid.Cell("small", 16, 4, 2048, policy, keys={"train.base_gemm": base_gemm})
    cell, plan = grid.plan_of(asked, room.device)
    measured = grid.measure(cell, plan, room, steps=1)
    assert plan.phases[1].allocated == pytest.approx(measured.allocated, rel=0.05)
    assert room.left_behind() < 32 << 20


def test_streamed_layers_take_what_is_planned(grid: ModuleType, room) -> None:
    asked = grid.Cell("small", 16, 4, 2048, "full", keys={"model.offload": "layers"})
    cell, plan = grid.plan_of(asked, room.device)
    measured = grid.measure(cell, plan, room, steps=1)
    assert plan.phases[1].allocated == pytest.approx(measured.allocated, rel=0.05)
