"""The run's folder while it is worked in: links and files in the way, folders and files that vanish."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.track.jsonl import JsonlTracker
from tests.faults.failures import attempt
from tests.faults.scene import STEPS, Scene, differences


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Runs are made in this process; `whole` is a finished one."""
    scene = Scene(tmp_path_factory.mktemp("places"), None)
    code, text = attempt(scene.line("whole"))
    assert code == 0, text
    yield scene


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below `folder`."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def by_a_link(place: Path) -> None:
    place.rename(place.with_name(f"moved-{place.name}"))
    place.symlink_to(f"moved-{place.name}")


def by_a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("a note of the user's")


@pytest.mark.parametrize("taken", [by_a_link, by_a_file])
@pytest.mark.parametrize("name", ["adapter", "checkpoints", "exports", "exports/merged"])
def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(
    scene: Scene, name: str, taken: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps were made, or a whole model merged, before it was noticed; a file was deleted in silence."""
    run = scene.copy("whole", "taken")
    (run / "exports" / "merged").mkdir(parents=True)
    (run / "exports" / ".lock").touch()
    taken(run / name)
    before = contents(run)
    keys: dict[str, Any] = {"train.max_steps": STEPS + 1}
    line = scene.line("taken", **keys)
    if name.startswith("exports"):
        line = ["export", f"run={run}", "export.format=[merged]", "model.device=cpu"]
    with patch("transformers.AutoTokenizer.from_pretrained", side_effect=AssertionError("loads")):
        code, text = attempt(line)
    assert code == 74 and text.count("\n") == 1 and f"error: {run / name} is a" in text, text
    assert contents(run) == before


def test_a_run_whose_folder_is_itself_a_link_trains_into_it(scene: Scene) -> None:
    (scene.folder / "big-disk").mkdir()
    (scene.folder / "linked").symlink_to("big-disk")
    code, text = attempt(scene.line("linked"))
    assert code == 0, text
    assert (scene.folder / "linked").is_symlink()
    assert differences(scene.folder / "whole", scene.folder / "big-disk") == []


def after_step(step: int, act: Callable[[], None]) -> Any:
    """Does something to the disk right after the record of a step is written."""
    original = JsonlTracker.log

    def log(self: JsonlTracker, record: dict[str, Any]) -> None:
        original(self, record)
        if record["step"] == step:
            act()

    return patch.object(JsonlTracker, "log", log)


def test_a_run_folder_that_vanishes_is_said_and_not_made_anew(scene: Scene) -> None:
    run = scene.folder / "vanishing"
    with after_step(2, lambda: shutil.rmtree(run)):
        code, text = attempt(scene.line("vanishing"))
    assert code == 74 and text.splitlines()[-1].startswith(f"error: {run / 'metrics.jsonl'} was removed")
    assert "could not be saved" in text and f"{run} is gone" in text
    assert not run.exists()


def test_a_run_folder_that_is_moved_away_is_said_and_not_made_anew(scene: Scene) -> None:
    run, moved = scene.folder / "moving", scene.folder / "moved"
    with after_step(2, lambda: run.rename(moved) and None):
        code, text = attempt(scene.line("moving"))
    assert code == 74 and f"error: {run} is gone" in text and not run.exists()
    moved.rename(run)
    assert attempt(scene.line("moving"))[0] == 0
    assert differences(scene.folder / "whole", run) == []


def test_a_metrics_file_that_vanishes_ends_the_run_with_its_state(scene: Scene) -> None:
    """Its lines went to a file without a name, and the run said `done`."""
    run = scene.folder / "unmeasured"
    with after_step(3, (run / "metrics.jsonl").unlink):
        code, text = attempt(scene.line("unmeasured"))
    assert code == 74 and "metrics.jsonl was removed" in text and "the state after step 4 is saved" in text
    assert scene.steps("unmeasured") == [3, 4]


def test_a_status_that_cannot_be_written_ends_no_run(scene: Scene) -> None:
    run = scene.folder / "silent"

    def in_the_way() -> None:
        (run / "status.json").unlink()
        (run / "status.json").mkdir()

    with after_step(3, in_the_way):
        code, text = attempt(scene.line("silent"))
    assert code == 0 and text.count("status.json is not of the end") == 1, text
    assert differences(scene.folder / "whole", run) == []
    assert os.listdir(run / "status.json") == []
    # At a start it can be mended: then it is refused.
    code, text = attempt(scene.line("silent"))
    assert code == 74 and f"cannot write {run / 'status.json'}: Is a directory" in text


def test_a_status_that_can_be_written_again_is(scene: Scene) -> None:
    run = scene.folder / "interrupted"

    def in_the_way() -> None:
        (run / "status.json").unlink()
        (run / "status.json").mkdir()

    with after_step(3, in_the_way), after_step(5, lambda: (run / "status.json").rmdir()):
        code, text = attempt(scene.line("interrupted"))
    assert code == 0 and "status.json is not" not in text
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_a_reader_that_goes_away_ends_no_run(scene: Scene) -> None:
    """`qlora-trainer … 2>&1 | head`: it ended in exit 0 with nothing trained."""
    read, write = os.pipe()
    with open(write, "w", buffering=1) as gone:
        os.close(read)
        with redirect_stderr(gone), redirect_stdout(gone):
            assert main(scene.line("unheard")) == 0
    assert differences(scene.folder / "whole", scene.folder / "unheard") == []
