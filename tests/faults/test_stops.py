"""Signals in every phase, on one rank of several, and again: nothing is lost, and soon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_trainer.train.signals import ONE_REQUEST
from tests.faults import hooks
from tests.faults.scene import Scene, differences, metrics

WITHIN = 20  # seconds from the signal to the end of the process

EVALUATED: dict[str, Any] = {"evaluate.enabled": "true", "evaluate.eval_steps": 4, "evaluate.max_rows": 2}


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("tokenizing", signal.SIGTERM),
        ("loading", signal.SIGUSR1),
        ("training", signal.SIGUSR1),
        ("evaluating", signal.SIGTERM),
        ("saving", signal.SIGUSR1),
        ("exporting", signal.SIGTERM),
    ],
)
def test_a_signal_in_any_phase_is_exit_75_and_the_same_bytes_later(
    scene: Scene, phase: str, number: int
) -> None:
    stopped_in_phase(scene, phase, number)


def stopped_in_phase(scene: Scene, phase: str, number: int) -> None:
    keys = {**EVALUATED, "data.eval_path": scene.folder / "eval.json"}
    whole = scene.uninterrupted(**keys)
    name = f"signal-{phase}-{number}"
    started = time.monotonic()
    scene.train(name, ("signal_in_phase", phase, number), expect=75, **keys)
    assert time.monotonic() - started < WITHIN
    status = scene.status(name)
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    assert status["signal"] == signal.Signals(number).name
    scene.train(name, **keys)
    assert differences(whole, scene.folder / name) == []
    assert scene.status(name)["state"] == "done"


def test_a_step_that_takes_long_is_undone_and_made_again(scene: Scene) -> None:
    name = "long-step"
    run = scene.start(name, ("impatient", 0.2), ("slow_micro_batches", 0.5))
    run.wait_for("micro-batch", times=3)  # that is the first of the second step
    run.send(signal.SIGTERM)
    assert run.wait(WITHIN) == 75
    assert scene.steps(name) == [1] and run.text().count("micro-batch") == 3
    scene.train(name)
    assert differences(scene.uninterrupted(), scene.folder / name) == []


@pytest.mark.parametrize("phase", ["saving", "training"])
def test_a_second_signal_ends_it_at_once_and_nothing_is_torn(scene: Scene, phase: str) -> None:
    name = f"twice-{phase}"
    run = scene.start(name, ("slow_phase", phase, 60))
    run.wait_for(f"in {phase}")
    run.send(signal.SIGTERM)
    time.sleep(ONE_REQUEST + 0.2)
    started = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == 75 and time.monotonic() - started < 2
    scene.train(name)
    assert differences(scene.uninterrupted(), scene.folder / name) == []


# ---- several processes -------------------------------------------------------------------------


def both_ranks(scene: Scene, name: str, *hooks_of_rank_1: Any, expect: int, **keys: Any) -> None:
    """Two ranks of one run, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        chosen = hooks_of_rank_1 if rank else ()
        ranks.append(scene.start(name, *chosen, env={key: str(value) for key, value in env.items()}, **keys))
    for run in ranks:
        assert run.wait() == expect, run.text()


def uninterrupted(scene: Scene) -> Path:
    """The finished run of two ranks; made once."""
    if not (scene.folder / "ranks").exists():
        both_ranks(scene, "ranks", expect=0)
    return scene.folder / "ranks"


def test_a_signal_to_one_rank_stops_all_at_the_same_step(scene: Scene) -> None:
    both_ranks(scene, "one-rank-stopped", ("signal_at_micro_batch", 9, hooks.SIGUSR1), expect=75)
    assert scene.status("one-rank-stopped")["step"] == 5 == scene.steps("one-rank-stopped")[-1]
    both_ranks(scene, "one-rank-stopped", expect=0)
    assert differences(uninterrupted(scene), scene.folder / "one-rank-stopped") == []


@pytest.mark.parametrize(
    ("name", "hook", "code"),
    [("full", ("out_of_memory", 5, 6), 2), ("buggy", ("bug", "only on this rank", 5), 70)],
)
def test_all_ranks_end_when_one_fails_in_a_step(scene: Scene, name: str, hook: Any, code: int) -> None:
    output = f"one-rank-{name}"
    both_ranks(scene, output, hook, expect=code)
    assert scene.steps(output) == [2]
    assert "another process of this run failed" in scene.status(output)["message"]
    both_ranks(scene, output, expect=0)
    assert differences(uninterrupted(scene), scene.folder / output) == []


def test_all_ranks_end_when_one_fails_in_an_evaluation(scene: Scene) -> None:
    keys: dict[str, Any] = {
        "evaluate.enabled": "true",
        "evaluate.eval_steps": 2,
        "data.eval_path": scene.folder / "eval.json",
    }
    both_ranks(scene, "one-rank-unmeasured", ("bug_in_evaluation", "eval_loss"), expect=70, **keys)
    assert scene.steps("one-rank-unmeasured") == [2]
    # Four rows are one batch: a rank that has none waited for the other for ever.
    both_ranks(scene, "one-rank-unmeasured", expect=0, **keys)
    evaluated = [
        line["step"] for line in metrics(scene.folder / "one-rank-unmeasured") if "eval_loss" in line
    ]
    assert evaluated == [2, 4, 6, 8]


def launch(scene: Scene, name: str) -> subprocess.Popen[str]:
    """`accelerate launch` with two processes, on steps that take a while."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", "qlora_trainer", *scene.line(name, train__max_steps=2000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    output = (scene.folder / f"{name}.txt").open("w")
    return subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment)


def wait_for_steps(
    scene: Scene, name: str, process: subprocess.Popen[str], steps: int = 2
) -> list[psutil.Process]:
    """The ranks, once rank 0 has logged some steps."""
    metrics = scene.folder / name / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, (scene.folder / f"{name}.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    return ranks


def test_no_rank_is_left_behind_when_the_launcher_dies(scene: Scene) -> None:
    launcher = launch(scene, "orphans")
    ranks = wait_for_steps(scene, "orphans", launcher)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=WITHIN)
    assert not alive
    status = scene.status("orphans")
    assert status["state"] == "stopped" and scene.steps("orphans")[-1] == status["step"]
    # The same command goes on from there, here in one process less: refused, naming both.
    text = scene.train("orphans", expect=2, train__max_steps=2000)
    assert "world_size was 2 and is now 1" in text


def test_the_launcher_passes_a_signal_on(scene: Scene) -> None:
    launcher = launch(scene, "launched")
    ranks = wait_for_steps(scene, "launched", launcher)
    launcher.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=WITHIN)
    assert not alive and Path(scene.folder / "launched" / "status.json").exists()
    launcher.wait(30)
    status = scene.status("launched")
    assert status["state"] == "stopped" and scene.steps("launched")[-1] == status["step"]
