"""Whatever fails, wherever: one line, the right exit code, and the state after the last whole step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from qlora_trainer.errors import Bug, CheckpointError, explained
from qlora_trainer.track.jsonl import JsonlTracker
from tests.faults import failures
from tests.faults.failures import ERRORS, KEYS, SEAMS
from tests.faults.scene import Scene


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Path]]:
    """A scene whose runs are made in this process, and a run in which nothing fails."""
    scene = Scene(tmp_path_factory.mktemp("failures"), None)
    code, text = failures.attempt(
        scene.line("whole", **KEYS, **{"data.eval_path": scene.folder / "eval.json"})
    )
    assert code == 0, text
    yield scene, scene.folder / "whole"


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_its_code_and_one_line(name: str) -> None:
    error, code = ERRORS[name]
    known = explained(error())
    assert known.exit_code == code and "\n" not in str(known) and len(str(known)) < 500
    assert isinstance(known, Bug) == (code == 70) == str(known).startswith("this is a bug")
    more = known.adding("more")
    assert (type(more), more.exit_code, str(more)) == (type(known), code, f"{known}; more")


def test_a_refusal_says_where_why_and_what_to_do() -> None:
    assert str(explained(ERRORS["named file"][0]())) == (
        "/data/a: Input/output error; the disk or the way to it fails: look at it (dmesg)"
    )
    assert str(explained(ERRORS["wrapped"][0]())) == (
        "while generating: No space left on device; "
        "make room, or write to another disk (output_dir, data.cache_dir)"
    )
    assert "ulimit -f" in str(explained(ERRORS["safetensors: I/O"][0]()))


# Each seam with three errors, so that most errors are raised somewhere; scripts/fault_sweep tries every pair.
NAMES = itertools.cycle(["ENOSPC", "CUDA memory", "worker", "key", "EFBIG", "not UTF-8", "ours"])
SAMPLE = [(place, next(NAMES)) for place in SEAMS for _ in range(2)]


@pytest.mark.parametrize(("place", "name"), SAMPLE)
def test_whatever_fails_the_state_after_the_last_step_is_saved(
    here: tuple[Scene, Path], place: str, name: str
) -> None:
    scene, whole = here
    assert failures.problems(scene, whole, f"{place}-{name}".replace(" ", "-"), place, name) == []


@pytest.mark.parametrize(("place", "expected"), [(None, 74), ("forward", 70)])
def test_a_metrics_file_that_cannot_be_closed_hides_no_other_error(
    here: tuple[Scene, Path], place: str | None, expected: int
) -> None:
    scene, _ = here
    line = scene.line(f"unclosed-{place}", **KEYS, **{"data.eval_path": scene.folder / "eval.json"})
    full = failures.Seam(JsonlTracker, "close", 1, kept=0)
    other = failures.broken(SEAMS[place], ERRORS["shapes"][0], 1) if place else nullcontext()
    with other, failures.broken(full, lambda: CheckpointError("metrics.jsonl: no room"), 1):
        code, text = failures.attempt(line)
    assert code == expected and text.count("error: ") == 1
    assert ("metrics.jsonl: no room" in text) == (place is None)
