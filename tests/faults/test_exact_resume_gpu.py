"""On a GPU: twenty steps, stopped and resumed; the same bytes when deterministic, near them when not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import Scene, differences

STEPS = 20
# Processes of their own and no zygote: a process that has touched CUDA cannot be forked.
PROGRAM = """
import json, sys
from tests.faults import hooks
for name, *arguments in json.loads(sys.argv[1]):
    getattr(hooks, name)(*arguments)
from qlora_trainer.__main__ import main
sys.exit(main([*sys.argv[2:], "-v"]))
"""
PATHS: dict[str, dict[str, Any]] = {
    "fast": {"lora.lora_dropout": 0.0},
    "dropout": {"lora.lora_dropout": 0.1},
    "reference": {"lora.lora_dropout": 0.1, "model.kernels": "reference"},
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("gpu"), None, hidden_size=256, intermediate_size=512)


def train(scene: Scene, name: str, *hooks: list[Any], expect: int, **keys: Any) -> Path:
    line = scene.line(name, train__max_steps=STEPS, checkpoint__save_steps=5, **keys)
    command = [sys.executable, "-c", PROGRAM, json.dumps(hooks), *line]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scene.folder)
    assert done.returncode == expect, done.stderr
    return scene.folder / name


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [32, 8])
def test_deterministic_training_resumes_bit_exactly(scene: Scene, path: str, bits: int) -> None:
    keys = {**PATHS[path], "optim.name": f"paged_adamw_{bits}bit", "train.deterministic": True}
    whole = train(scene, f"whole-{path}-{bits}", expect=0, **keys)
    name = f"stopped-{path}-{bits}"
    stopped = train(scene, name, ["signal_at_step", 7, 15], expect=75, **keys)
    assert 7 <= scene.status(name)["step"] < STEPS
    train(scene, name, expect=0, **keys)
    assert differences(whole, stopped) == []


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_training_that_need_not_be_deterministic_resumes_close(scene: Scene, path: str) -> None:
    keys = PATHS[path]
    whole = train(scene, f"free-{path}", expect=0, **keys)
    stopped = train(scene, f"free-stopped-{path}", ["signal_at_step", 7, 15], expect=75, **keys)
    first = scene.status(stopped.name)["step"]
    train(scene, stopped.name, expect=0, **keys)
    one, other = losses(whole), losses(stopped)
    assert len(one) == len(other) == STEPS
    assert other[first] == pytest.approx(one[first], rel=1e-6)
    assert other[first:] == pytest.approx(one[first:], rel=1e-3)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
