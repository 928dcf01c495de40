"""Every fault at every point, and one table: what `scripts/fault_sweep` runs (half an hour on 2 cores).

The tests of this folder try a sample of each; here is the whole. A point survives when what the
project promises about it holds: the run goes on with the same bytes, nothing acknowledged is lost,
the damage is noticed, the file is refused.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_trainer.checkpoint import format, resume
from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import disk
from tests.checkpoint import samples
from tests.faults import failures, hooks, killing, strace
from tests.faults.scene import STEPS, Scene, differences
from tests.faults.test_exact_resume import settings
from tests.faults.test_stops import stopped_in_phase
from tests.faults.zygote import Runner

OFFSETS = 64  # of each file
Points = Iterator[tuple[str, list[str]]]  # what was tried, and what did not hold afterwards


def killed_at_system_calls(folder: Path) -> Points:
    if not strace.available():
        return
    scene, run = folder / "scene", folder / "run"
    killing.prepare(scene)
    for call, number in strace.points(killing.copy(scene, run)):
        killed = strace.die_at(killing.copy(scene, run), call, number)
        yield f"{call} {number}", [*killing.problems(run), *([] if killed else ["was not killed"])]


def killed_between_python_and_c(folder: Path, swap: bool) -> Points:
    exchange = disk._exchange
    if not swap:
        setattr(disk, "_exchange", lambda first, second: False)  # noqa: B010
    try:
        scene, run = folder / "scene", folder / "run"
        killing.prepare(scene)
        for point in range(killing.points(killing.copy(scene, run))):
            killed = killing.die_at(killing.copy(scene, run), point)
            yield str(point), [*killing.problems(run), *([] if killed else ["was not killed"])]
    finally:
        setattr(disk, "_exchange", exchange)  # noqa: B010


def damaged(folder: Path, damage: Callable[[bytes, random.Random], bytes | None]) -> Points:
    """Every file of a checkpoint damaged in many ways: it must not verify, and the one before is taken."""
    samples.save(folder / resume.CHECKPOINTS, 1)
    whole = samples.save(folder / resume.CHECKPOINTS, 2)
    draw = random.Random(0)
    for file in sorted(whole.iterdir()):
        data = file.read_bytes()
        for number in range(OFFSETS):
            broken = damage(data, draw)
            file.unlink()
            if broken is not None:
                file.write_bytes(broken)
            named: list[str] = []
            found = resume.find(folder, "auto", warn=named.append)
            problems = [] if found is not None and found.step == 1 else ["taken for whole"]
            if not any(file.name in line for line in named):
                problems.append("not named")
            yield f"{file.name} {number}", problems
            file.write_bytes(data)
            if broken is None:
                break


def flipped(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(8 * len(data))
    return data[: place // 8] + bytes([data[place // 8] ^ (1 << place % 8)]) + data[place // 8 + 1 :]


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def full_disk(folder: Path) -> Points:
    """A save in which no file can grow over so many bytes, from nothing to all that it needs."""
    scene, run = folder / "scene", folder / "run"
    killing.prepare(scene)
    largest = max(file.stat().st_size for file in scene.rglob("*.safetensors"))
    for size in range(0, largest, max(1, largest // OFFSETS)):
        killing.copy(scene, run)
        pid = os.fork()
        if pid == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                samples.save(run / resume.CHECKPOINTS, 3)
            except CheckpointError as error:
                os._exit(error.exit_code)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = [str(path) for path in run.rglob(".tmp*")]
        problems = [] if code == 74 else [f"exit {code}"]
        yield f"{size} bytes", [*problems, *left, *killing.problems(run)]


def exact_resume(scene: Scene) -> Points:
    axes = itertools.product((False, True), (0, 2), (32, 8), (1, 4, 5, 7))
    for packing, workers, bits, stop in axes:
        keys = settings(packing, workers, bits)
        whole = scene.uninterrupted(**keys)
        name = f"sweep-{packing}-{workers}-{bits}-{stop}"
        scene.train(name, ("signal_at_step", stop, hooks.SIGTERM), expect=75, **keys)
        scene.train(name, **keys)
        yield name, differences(whole, scene.folder / name)
        shutil.rmtree(scene.folder / name)


def killed_any_time(scene: Scene) -> Points:
    """SIGKILL after a random time, again and again until the run gets to its end."""
    whole = scene.uninterrupted()
    draw = random.Random(0)
    began = time.monotonic()
    scene.train("timed")
    usual = time.monotonic() - began
    for number in range(24):
        name, code = f"killed-{number}", -9
        for attempt in range(20):
            run = scene.start(name)
            if attempt < 3:
                time.sleep(draw.uniform(0, usual))
                if run.alive():
                    run.send(signal.SIGKILL)
            code = run.wait()
            if code == 0:
                break
        yield name, differences(whole, scene.folder / name) if code == 0 else [f"exit {code}"]
        shutil.rmtree(scene.folder / name)


def signals(scene: Scene) -> Points:
    phases = ("tokenizing", "loading", "training", "evaluating", "saving", "exporting")
    for phase, number in itertools.product(phases, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        try:
            stopped_in_phase(scene, phase, number)
        except (AssertionError, TimeoutError) as error:
            yield f"{phase} {number}", [str(error)]
        else:
            yield f"{phase} {number}", []


def mutants(scene: Scene) -> Points:
    whole = scene.uninterrupted()
    scene.train("stopped", ("signal_at_step", 6, hooks.SIGTERM), expect=75)
    for mutant in hooks.MUTANTS:
        scene.copy("stopped", mutant)
        scene.train(mutant, (mutant,))
        found = differences(whole, scene.folder / mutant)
        yield mutant, [] if any("loss" in line for line in found) else ["not noticed"]


def whatever_fails(scene: Scene) -> Points:
    whole = "failures-whole"
    failures.attempt(scene.line(whole, **failures.KEYS, **{"data.eval_path": scene.folder / "eval.json"}))
    for place, name in itertools.product(failures.SEAMS, failures.ERRORS):
        output = f"failed-{place}-{name}".replace(" ", "-").replace("/", "-")
        yield f"{name} at {place}", failures.problems(scene, scene.folder / whole, output, place, name)
        shutil.rmtree(scene.folder / output)


class Tests:
    """Counts the tests of a file as points."""

    def __init__(self) -> None:
        self.points: list[tuple[str, list[str]]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.points.append((report.nodeid, [report.longreprtext] if report.failed else []))


def tests_of(name: str, choice: str = "") -> Points:
    counted = Tests()
    file = str(Path(__file__).with_name(name))
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", file, "-k", choice], plugins=[counted])
    yield from counted.points


def _guarded(points: Points) -> Points:
    """A row that cannot go on is a point that did not survive, and not the end of the table."""
    try:
        yield from points
    except (AssertionError, TimeoutError) as error:
        yield "the row ended", [str(error)]


def main() -> int:
    memory = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="fault-sweep-", dir=memory if os.access(memory, os.W_OK) else None))
    runner = Runner(base)
    scene = Scene(base, runner)
    fresh = (base / f"save-{number}" for number in itertools.count())
    rows: list[tuple[str, Callable[[], Points]]] = [
        ("save killed at a system call (strace)", lambda: killed_at_system_calls(next(fresh))),
        ("save killed around a call into C", lambda: killed_between_python_and_c(next(fresh), True)),
        ("the same, names not swappable", lambda: killed_between_python_and_c(next(fresh), False)),
        ("one bit of a checkpoint flipped", lambda: damaged(next(fresh), flipped)),
        ("checkpoint file truncated", lambda: damaged(next(fresh), truncated)),
        ("checkpoint file missing", lambda: damaged(next(fresh), lambda data, draw: None)),
        ("disk full while saving", lambda: full_disk(next(fresh))),
        ("stopped and resumed, bit-exact", lambda: exact_resume(scene)),
        ("killed at any time, bit-exact", lambda: killed_any_time(scene)),
        ("signal in a phase, bit-exact", lambda: signals(scene)),
        ("resume broken on purpose, noticed", lambda: mutants(scene)),
        ("every error at every place, bit-exact", lambda: whatever_fails(scene)),
        ("several ranks, launchers, second signals", lambda: tests_of("test_stops.py", "not phase_is")),
        ("not finite, out of memory, disks", lambda: tests_of("test_bad_steps.py")),
        ("trackers and network gone", lambda: tests_of("test_network.py")),
        ("canary secrets", lambda: tests_of("test_secrets.py")),
        ("hostile files", lambda: tests_of("test_hostile.py")),
    ]
    wanted = sys.argv[1:]
    table, failures = [], 0
    try:
        for name, points in rows:
            if wanted and not any(word in name for word in wanted):
                continue
            began, tried, survived = time.monotonic(), 0, 0
            for point, problems in _guarded(points()):
                tried += 1
                survived += not problems
                if problems:
                    print(f"{name}: {point}: {'; '.join(problems)[:2000]}", file=sys.stderr, flush=True)
            failures += tried - survived
            table.append(f"| {name} | {tried} | {survived} |")
            print(f"{table[-1]} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        runner.close()
        shutil.rmtree(base)
    print("| fault | points tried | survived |", "|---|---|---|", *table, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    assert STEPS > 7 and format.VERSION == 1, "the stop points are chosen for these"
    sys.exit(main())
