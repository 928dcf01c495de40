from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from qlora_trainer.system import disk
from tests.faults import killing

EVERY = 20  # points are tried in every run of the tests; scripts/fault_sweep tries all
MEMORY = Path("/dev/shm")  # a killed process needs no real disk, and fsync is free here


@pytest.mark.parametrize("swap", [True, False], ids=["names swapped", "old one steps aside"])
def test_a_save_killed_anywhere_loses_nothing_acknowledged(
    tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.access(MEMORY, os.W_OK):
        tmp_path = Path(tempfile.mkdtemp(prefix="killed-save-", dir=MEMORY))
    if not swap:
        monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    try:
        scene, run = tmp_path / "scene", tmp_path / "run"
        killing.prepare(scene)
        total = killing.points(killing.copy(scene, run))
        assert total >= 200
        # The two ways share most points: look at different ones.
        for point in range(0 if swap else EVERY // 2, total, EVERY):
            assert killing.die_at(killing.copy(scene, run), point)
            assert killing.problems(run) == [], f"killed at point {point} of {total}"
    finally:
        shutil.rmtree(tmp_path)


def test_the_check_notices_a_save_that_is_not_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sweep over a publisher that fills the target in place, as most savers do."""

    def in_place(target: Path, fill, *, needed: int = 0) -> Path:  # type: ignore[no-untyped-def]
        target.mkdir(exist_ok=True)
        fill(target)
        return target

    run = tmp_path / "run"
    killing.prepare(run)
    monkeypatch.setattr("qlora_trainer.checkpoint.publish.publish_folder", in_place)
    monkeypatch.setattr(disk, "publish_folder", in_place)
    assert killing.die_at(run, 20)
    assert killing.problems(run) != []
