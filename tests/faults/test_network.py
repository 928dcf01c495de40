"""Trackers and the network gone: the same numbers, the whole metrics file, and hardly any time lost."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from tests.faults.scene import STEPS, Scene, differences, metrics

LOST = 10  # seconds at most
WANDB: dict[str, Any] = {"track.report_to": "[wandb]"}
KEY = "0123456789abcdef0123456789abcdef01234567"


def seconds(scene: Scene, name: str, *hooks: Any, env: dict[str, str], **keys: Any) -> float:
    """From the last step of a run to its end: where a tracker that is gone would keep it."""
    scene.train(name, *hooks, env=env, **keys)
    run = scene.folder / name
    return (run / "status.json").stat().st_mtime - (run / "metrics.jsonl").stat().st_mtime


def may_unshare() -> bool:
    probe = ["unshare", "-n", "true"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.parametrize("fault", ["no network", "server gone", "service killed"])
def test_a_tracker_that_is_gone_costs_nothing_but_itself(scene: Scene, fault: str) -> None:
    if fault == "no network" and not may_unshare():
        pytest.skip("needs the right to make a network namespace")
    whole = scene.uninterrupted()
    alone = seconds(scene, "untracked", env={})
    name = fault.replace(" ", "-")
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}
    if fault == "no network":
        taken = seconds(scene, name, ("no_network",), env=online, **WANDB)
    elif fault == "server gone":
        taken = seconds(scene, name, env=online | {"WANDB_BASE_URL": "http://127.0.0.1:9"}, **WANDB)
    else:
        taken = seconds(scene, name, ("kill_children_at_step", 3), env={"WANDB_MODE": "offline"}, **WANDB)
    assert taken - alone < LOST
    assert len(metrics(scene.folder / name)) == STEPS
    assert differences(whole, scene.folder / name) == []
