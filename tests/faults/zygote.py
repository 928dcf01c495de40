"""Runs of the real command line in processes of their own, without importing torch for each.

A zygote imports everything once and forks a child for every run; the child is an ordinary process
(signals, SIGKILL, exit codes, its own output) that calls `qlora_trainer.__main__.main`. A fault that
cannot be caused from outside at an exact step is a function in `tests.faults.hooks`, applied in the
child before the run; what it patches, it patches there only.

The test's side is `Runner`; the zygote's is `main`. They speak JSON, one object a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass
class Run:
    """A run that was started; `output` holds what it printed, both streams."""

    runner: Runner
    pid: int
    output: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """The exit status; -9 for SIGKILL and so on. Kills it and fails when it takes longer."""
        answer = self.runner.ask({"wait": self.pid, "timeout": timeout})
        if answer["code"] is None:
            os.kill(self.pid, signal.SIGKILL)
            self.runner.ask({"wait": self.pid, "timeout": 10})
            raise TimeoutError(f"still running after {timeout} s:\n{self.text()}")
        return int(answer["code"])

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def wait_for(self, text: str, times: int = 1, timeout: float = 60) -> None:
        """Returns once it has printed `text` so many times."""
        end = time.monotonic() + timeout
        while self.text().count(text) < times:
            if time.monotonic() > end:
                raise TimeoutError(f"no {text!r} after {timeout} s:\n{self.text()}")
            time.sleep(0.01)


class Runner:
    """The zygote, from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, *argv: str, env: dict[str, str] | None = None, hooks: list[list[Any]] | None = None
    ) -> Run:
        """Begins `python -m qlora_trainer *argv`; `hooks` are [name, arguments …] of `tests.faults.hooks`."""
        self.runs += 1
        output = self.folder / f"output-{self.runs}.txt"
        request = {"argv": argv, "env": env or {}, "hooks": hooks or [], "output": str(output)}
        return Run(self, self.ask(request)["pid"], output)

    def run(self, *argv: str, timeout: float = 60, **options: Any) -> tuple[int, str]:
        """Exit status and output of a run."""
        run = self.start(*argv, **options)
        return run.wait(timeout), run.text()

    def close(self) -> None:
        self._process.communicate()  # the end of its input is the end of it


def main() -> None:
    from tests.faults import hooks  # with everything a run needs

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": _wait(request["wait"], request["timeout"])}
        else:
            answer = {"pid": _fork(request, hooks)}
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any], hooks: Any) -> int:
    Path(request["output"]).touch()
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    from qlora_trainer.__main__ import main as command_line

    sys.argv = ["qlora_trainer", *request["argv"]]  # what status.json says the command was
    code = 70
    try:
        for name, *arguments in request["hooks"]:
            getattr(hooks, name)(*arguments)
        code = command_line([*request["argv"], "-v"])
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


if __name__ == "__main__":
    main()
