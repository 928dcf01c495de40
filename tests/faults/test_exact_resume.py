"""Interrupted runs equal uninterrupted ones to the last bit, and the check can fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import hooks
from tests.faults.scene import STEPS, Scene, differences

# Every value of every axis at least once; scripts/fault_sweep tries all 32 combinations. Stops: before
# the first checkpoint that is due, between two, at an epoch's end, and one step before the end.
SAMPLE = [
    (1, False, 0, 32),
    (4, True, 2, 32),
    (5, False, 2, 8),
    (7, True, 0, 8),
]


@pytest.mark.parametrize(("stop", "packing", "workers", "bits"), SAMPLE)
def test_an_interrupted_run_ends_with_the_same_bytes(
    scene: Scene, stop: int, packing: bool, workers: int, bits: int
) -> None:
    keys = settings(packing, workers, bits)
    whole = scene.uninterrupted(**keys)
    name = f"stopped-{stop}-{packing}-{workers}-{bits}"
    scene.train(name, ("signal_at_step", stop, hooks.SIGTERM), expect=75, **keys)
    assert scene.status(name)["step"] == stop and scene.steps(name)[-1] == stop
    resumed = scene.train(name, **keys)
    assert f"step {stop} of {STEPS}" in resumed
    assert differences(whole, scene.folder / name) == []


def settings(packing: bool, workers: int, bits: int) -> dict[str, Any]:
    return {
        "train.packing": packing,
        "data.num_workers": workers,
        "optim.name": f"paged_adamw_{bits}bit",
        "model.kernels": "auto" if bits == 32 else "reference",  # both paths drop, each in its own way
    }


def test_a_killed_run_ends_with_the_same_bytes(scene: Scene) -> None:
    """SIGKILL a step after the checkpoint of step 3, twice: the lost steps are made again, alike."""
    whole = scene.uninterrupted()
    scene.train("killed", ("signal_at_step", 4, hooks.SIGKILL), expect=-9)
    assert scene.steps("killed") == [3]
    scene.train("killed", ("signal_at_step", 5, hooks.SIGKILL), expect=-9)
    scene.train("killed")
    assert differences(whole, scene.folder / "killed") == []


def test_a_finished_run_that_is_run_again_changes_nothing(scene: Scene) -> None:
    whole = scene.uninterrupted()
    scene.copy(whole.name, "again")
    assert "nothing left to do" in scene.train("again")
    assert differences(whole, scene.folder / "again") == []


def test_an_evaluation_cut_short_is_made_up_for(scene: Scene) -> None:
    keys: dict[str, Any] = {
        "evaluate.enabled": "true",
        "evaluate.eval_steps": 2,
        "data.eval_path": scene.folder / "eval.json",
        "checkpoint.save_steps": 2,
    }
    whole = scene.uninterrupted(**keys)
    scene.train("evaluating", ("signal_in_phase", "evaluating", hooks.SIGUSR1), expect=75, **keys)
    assert scene.steps("evaluating") == [2] and scene.status("evaluating")["signal"] == "SIGUSR1"
    scene.train("evaluating", **keys)
    assert differences(whole, scene.folder / "evaluating") == []


@pytest.mark.parametrize("mutant", hooks.MUTANTS)
def test_the_check_notices(scene: Scene, mutant: str) -> None:
    """Each mutant breaks resuming in one way; a check that lets it pass proves nothing."""
    whole = scene.uninterrupted()
    if not (scene.folder / "stopped").exists():
        scene.train("stopped", ("signal_at_step", 6, hooks.SIGTERM), expect=75)
    scene.copy("stopped", mutant)
    scene.train(mutant, (mutant,))
    assert any("loss" in found for found in differences(whole, scene.folder / mutant))


def test_another_run_is_refused_and_an_allowed_change_is_not(scene: Scene) -> None:
    whole = scene.uninterrupted()
    scene.copy(whole.name, "changed")
    keys: dict[str, Any] = {"train.max_steps": STEPS + 1, "train.max_length": 40}
    allowed: list[str] = []
    for name, said in (
        ("train.max_length", "train.max_length was 48 and is now 40"),
        ("train.max_steps", "the learning rate jumps"),
        ("data", "data was"),
    ):
        assert said in scene.train("changed", expect=2, **keys)
        allowed.append(name)
        keys["checkpoint.allow_change"] = f"[{','.join(allowed)}]"
    scene.train("changed", **keys)
    assert scene.steps("changed")[-1] == STEPS + 1
    keys |= {"lora.r": 2, "train.max_steps": STEPS + 2, "checkpoint.allow_change": "[lora,train.max_steps]"}
    assert "does not fit" in scene.train("changed", expect=74, **keys)  # allowed, and impossible


def test_another_thread_count_is_told(scene: Scene) -> None:
    scene.train("threads", ("signal_at_step", 2, hooks.SIGTERM), expect=75)
    assert "last bits" not in scene.train("threads", ("signal_at_step", 4, hooks.SIGTERM), expect=75)
    assert "CPU threads was 1, is 2" in scene.train("threads", ("threads", 2))


def test_a_corrupt_checkpoint_is_named_and_passed_over(scene: Scene) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "corrupt")
    file = run / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    text = scene.train("corrupt")
    assert file.parent.name in text and "optimizer.safetensors" in text and f"step 6 of {STEPS}" in text
    assert differences(whole, run) == []
    file.write_bytes(b"")
    text = scene.train("corrupt", expect=74, **{"checkpoint.resume_from_checkpoint": file.parent})
    assert "optimizer.safetensors: 0 bytes" in text


def test_starting_over_keeps_what_was_there_and_never_goes_back_to_it(scene: Scene) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "over")
    never: dict[str, Any] = {"checkpoint.resume_from_checkpoint": "never"}
    scene.train("over", ("signal_at_step", 2, hooks.SIGTERM), expect=75, **never)
    assert scene.steps("over") == [2] and (run / "old-1" / "checkpoints").is_dir()
    scene.train("over")
    assert differences(whole, run) == []
