from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_trainer.train.signals import Status

PROGRAM = """
import os, sys, time
from pathlib import Path
from qlora_trainer.errors import PreemptedError
from qlora_trainer.train import signals

signals.GRACE = 1.0
signals.ONE_REQUEST = 3.0  # wide enough for a busy machine to keep two signals inside it
status = signals.Status(Path(sys.argv[1]) / "status.json")

def ready(): print("ready", flush=True)

def wait(stop=lambda: False, limit=30.0):
    end = time.monotonic() + limit
    while time.monotonic() < end and not stop(): time.sleep(0.01)

try:
    with signals.StopSignals(status) as stop:
        BODY
except PreemptedError as error:
    status.finish(error.exit_code, str(error))
    print(error, flush=True)
    sys.exit(error.exit_code)
print("end", flush=True)
"""


class Child:
    """A program that uses the signals as a run does; stopped by the test, never left behind."""

    def __init__(self, folder: Path, body: str) -> None:
        indented = textwrap.indent(textwrap.dedent(body), " " * 8).strip()
        self.folder = folder
        program = PROGRAM.replace("BODY", indented)
        command = [sys.executable, "-c", program, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout: float = 10) -> tuple[int, str]:
        """Exit code and the rest of what it printed."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def status(self) -> dict[str, object]:
        return json.loads((self.folder / "status.json").read_bytes())


Start = Callable[[str], Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    children: list[Child] = []

    def begin(body: str) -> Child:
        children.append(Child(tmp_path, body))
        return children[-1]

    yield begin
    for child in children:
        child.process.kill()
        child.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_training_is_asked_and_not_interrupted(start: Start, number: int) -> None:
    child = start(
        """
        with stop.phase("training"):
            ready(); wait(stop.requested); print("saved", flush=True)
        """
    )
    assert child.line() == "ready\n"
    child.send(number)
    code, output = child.end()
    assert code == 75 and output.startswith("saved\n")
    status = child.status()
    assert status["state"] == "stopped" and status["exit_code"] == 75
    assert status["signal"] == signal.Signals(number).name


def test_what_was_going_on_is_named_after_the_last_phase(start: Start) -> None:
    """A signal that arrives while the last checkpoint is saved is heeded once that is done."""
    child = start(
        """
        with stop.phase("training"):
            with stop.phase("saving"): ready(); wait(stop.requested)
            print(stop._phase, flush=True)
        """
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    code, output = child.end()
    assert code == 75 and output.startswith("training\n")
    assert "stopped on SIGTERM while going on after training: run the same command" in output


def test_loading_is_left_at_once(start: Start) -> None:
    child = start('with stop.phase("loading", interruptible=True): ready(); wait()')
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    code, output = child.end(5)
    assert code == 75 and "SIGTERM while loading" in output
    assert child.status()["phase"] == "loading"


def test_loading_that_does_not_let_go_is_ended(start: Start) -> None:
    child = start(
        """
        with stop.phase("loading", interruptible=True):
            try: ready(); wait()
            except PreemptedError: wait()  # a library that swallows what it does not know
        """
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    code, _ = child.end(8)
    assert code == 75 and child.status()["message"] == "stopped while loading, which did not let go"


def test_main_thread_stuck_outside_python_is_ended(start: Start) -> None:
    """A call into C that restarts after a signal, as a barrier or a tokenizer does."""
    child = start(
        """
        import ctypes
        with stop.phase("tokenizing", interruptible=True):
            ready()
            no_signals, number = (ctypes.c_ulong * 16)(), ctypes.c_int()
            ctypes.CDLL(None).sigwait(no_signals, ctypes.byref(number))
        """
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    assert child.end(8)[0] == 75


def test_a_second_signal_leaves_at_once_and_one_passed_on_twice_does_not(start: Start) -> None:
    child = start(
        """
        with stop.phase("saving"):
            ready(); wait()
        """
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    time.sleep(0.3)
    child.send(signal.SIGTERM)  # the scheduler's and the launcher's copies of one request
    time.sleep(3)
    assert child.process.poll() is None
    child.send(signal.SIGUSR1)
    assert child.end()[0] == 75


def test_a_request_that_comes_while_saving_the_last_step_is_kept_for_the_next_phase(start: Start) -> None:
    child = start(
        """
        with stop.phase("training"):
            ready(); wait(stop.requested)
        print("not reached")
        """
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGUSR1)
    code, output = child.end()
    assert code == 75 and "not reached" not in output


def test_signals_to_a_forked_child_do_not_reach_the_run(start: Start) -> None:
    child = start(
        """
        with stop.phase("training"):
            pid = os.fork()
            if pid == 0:
                print(os.getpid(), flush=True); wait(limit=20); os._exit(0)
            _, code = os.waitpid(pid, 0)
            assert os.WTERMSIG(code) == 15, code
            assert not stop.requested()
        """
    )
    pid = int(child.line())
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGTERM)
    assert child.end() == (0, "end\n")


def test_status_is_always_whole(tmp_path: Path) -> None:
    from qlora_trainer.train.signals import Status

    status = Status(tmp_path / "status.json")
    status.update(phase="training", total_steps=400)
    stop = threading.Event()
    seen = []

    def write() -> None:
        for step in range(200):
            status.update(step=step)

    writers = [threading.Thread(target=write) for _ in range(2)]

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads((tmp_path / "status.json").read_bytes())["total_steps"])

    reader = threading.Thread(target=read)
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert set(seen) == {400} and os.listdir(tmp_path) == ["status.json"]


def test_ticks_are_rare_and_the_last_word_has_all_fields(tmp_path: Path) -> None:
    from qlora_trainer.train.signals import Status

    status = Status(tmp_path / "status.json")
    status.update(phase="training")
    for step in range(100):
        status.tick(step=step)
    assert "step" not in json.loads((tmp_path / "status.json").read_bytes())
    status.finish(0)
    last = json.loads((tmp_path / "status.json").read_bytes())
    assert (last["state"], last["step"], last["exit_code"]) == ("done", 99, 0)
    Status(None).update(phase="training")  # other ranks write nothing


def test_a_signal_after_the_last_word_changes_nothing(tmp_path):
    child = Child(
        tmp_path,
        """
        status.write_to(Path(sys.argv[1]) / "status.json")
        with stop.phase("exporting", interruptible=True):
            pass
        stop.over()
        status.finish(0)
        ready()
        wait(limit=2.0)
        """,
    )
    assert child.line() == "ready\n"
    child.send(signal.SIGTERM)
    assert child.end(60) == (0, "end\n")
    assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "done"


@pytest.mark.parametrize(
    ("content", "sessions"),
    [
        ('{"sessions": 5, "first_step": 1, "step": 2}', [{"first_step": 1, "step": 2}]),
        ('{"sessions": ["x", {"first_step": 0, "step": 1}, {"step": 1}]}', [{"first_step": 0, "step": 1}]),
        ("[1]", []),
        ("null", []),
        ('{"first_step"', []),
        ("\xff", []),
        ("[" * 100_000, []),
    ],
)
def test_a_damaged_status_costs_what_it_told_and_no_run(
    tmp_path: Path, content: str, sessions: object
) -> None:
    path = tmp_path / "status.json"
    path.write_text(content, encoding="latin-1")
    Status().write_to(path)
    assert json.loads(path.read_text())["sessions"] == sessions
