"""Processes of one job end together, and a signal to all of them spares the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def test_a_shielded_worker_outlives_signals_and_not_the_trainer() -> None:
    program = (
        "import os, time; from qlora_trainer.system.processes import shield_worker\n"
        "if os.fork() == 0:\n"
        "    shield_worker(); print(os.getpid(), flush=True)\n"
        "time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(pid, 0)
    process.kill()
    process.wait()
    process.stdout.close()
    gone(pid)


def gone(pid: int, seconds: float = 5) -> None:
    """Fails unless the process ends; a zombie that nobody reaps here has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.parametrize("launched", [True, False])
def test_only_a_launched_run_follows_its_parent(launched: bool) -> None:
    """The middle process is the launcher; the inner one the run."""
    inner = (
        "import os, time; from qlora_trainer.system import processes; processes.follow_launcher()\n"
        "print(os.getpid(), flush=True); time.sleep(30)"
    )
    launchers = ("ACCELERATE_", "TORCHELASTIC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    if launched:
        environment["ACCELERATE_MIXED_PRECISION"] = "no"
    outer = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(30)"
    )
    command = [sys.executable, "-c", outer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    if launched:
        gone(pid)
    else:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)  # raises if it is gone
    process.stdout.close()
