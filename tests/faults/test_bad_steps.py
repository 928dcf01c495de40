"""Steps that go wrong: numbers that are not finite, memory that runs out, disks that fill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import hooks
from tests.faults.scene import STEPS, Scene, differences

EVERY_STEP: dict[str, Any] = {"checkpoint.save_steps": 1}


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    files = ("optimizer.safetensors", "adapter_model.safetensors")
    return {f"{name}: {key}": tensor for name in files for key, tensor in load_file(folder / name).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("value", "bits", "kernels"), [("nan", 32, "auto"), ("inf", 8, "reference")])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(
    scene: Scene, value: str, bits: int, kernels: str
) -> None:
    name = f"not-finite-{value}"
    keys = {**EVERY_STEP, "optim.name": f"paged_adamw_{bits}bit", "model.kernels": kernels}
    scene.train(name, ("poison_steps", value, 3, 5), **keys)
    run = scene.folder / name
    assert same(state_of(run, 2), state_of(run, 3)) and same(state_of(run, 4), state_of(run, 5))
    assert not same(state_of(run, 3), state_of(run, 4))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("nonfinite")] == [3, 5]
    assert all(len(line["rows"]) == 4 for line in lines if line.get("nonfinite"))


def test_three_in_a_row_are_exit_3_also_across_a_resume(scene: Scene) -> None:
    text = scene.train("diverged", ("poison_steps", "nan", 2, 3, 4), expect=3, **EVERY_STEP)
    assert "up to step 4 (data rows" in text and scene.status("diverged")["exit_code"] == 3
    assert same(state_of(scene.folder / "diverged", 1), state_of(scene.folder / "diverged", 3))
    poison = ("poison_steps", "nan", 4, 5)
    scene.train("diverged-later", poison, ("signal_at_step", 5, hooks.SIGTERM), expect=75)
    text = scene.train("diverged-later", ("poison_steps", "nan", 1), expect=3)
    assert "up to step 6" in text


def test_a_step_that_fits_the_second_time_changes_nothing(scene: Scene) -> None:
    """Every kind of place: the first micro-batch, one in the middle, the last of a step."""
    scene.train("full-once", ("out_of_memory", 1, 6, 10))
    assert differences(scene.uninterrupted(), scene.folder / "full-once") == []


def test_a_step_that_never_fits_ends_the_run_and_keeps_what_was_learned(scene: Scene) -> None:
    text = scene.train("full", ("out_of_memory", 8, 9), expect=2)
    assert "out of memory in step 4" in text and "planned peak" in text
    assert "to need less, set train.per_device_train_batch_size=1" in text
    assert scene.steps("full")[-1] == 3 and scene.status("full")["exit_code"] == 2
    scene.train("full")
    assert differences(scene.uninterrupted(), scene.folder / "full") == []


def test_a_disk_that_is_too_small_is_known_before_the_first_step(scene: Scene) -> None:
    assert "free" in scene.train("small-disk", ("free_space", 50_000, 0), expect=74)
    # Where there is room for a start, but not for what will be written:
    text = scene.train("small-disk", ("free_space", 50_000, 2), expect=74)
    assert "50,000 free" in text and "bytes" in text
    assert "step 1/" not in text and scene.steps("small-disk") == []


def test_a_disk_that_fills_while_training_keeps_the_last_checkpoint(scene: Scene) -> None:
    keys = {**EVERY_STEP, "optim.name": "adamw"}
    text = scene.train("filling", ("file_size_limit_at_step", 3, 20_000), expect=74, **keys)
    assert "File too large" in text and "step-000003" in text
    run = scene.folder / "filling"
    assert scene.steps("filling") == [1, 2]
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    scene.train("filling", **keys)
    assert differences(scene.uninterrupted(**keys), run) == []


def test_steps_is_what_the_scene_has(scene: Scene) -> None:
    assert scene.steps(scene.uninterrupted().name) == [3, 6, STEPS]
