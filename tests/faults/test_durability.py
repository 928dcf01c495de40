"""Nothing is named before it is on the disk, and nothing old removed before what replaces it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.system import disk
from qlora_trainer.track import jsonl
from tests.faults import killing
from tests.faults.durability import Recorder


@pytest.mark.parametrize("swap", [True, False], ids=["names swapped", "old one steps aside"])
def test_what_a_save_names_is_on_the_disk(
    tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:
        monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    run = tmp_path / "run"
    killing.prepare(run)
    with Recorder(tmp_path) as recorder:
        killing.act(run)
    assert recorder.problems == []
    names = [path.name for path in recorder.renamed]
    assert names == ["step-000003", "status.json", "step-000003", "adapter", "step-000004"]


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(disk.TEMPORARY)


LOST: dict[str, Callable[[Path], bool]] = {
    "files of a folder": lambda path: path.is_file() and _is_temporary(path.parent),
    "one file of a folder": lambda path: path.name == "manifest.json",
    "the folder": lambda path: path.is_dir() and _is_temporary(path),
    "the folder's parent": lambda path: path.is_dir() and not _is_temporary(path),
    "a file by itself": lambda path: path.is_file() and _is_temporary(path),
}


@pytest.mark.parametrize("fsync", LOST)
@pytest.mark.parametrize("swap", [True, False], ids=["names swapped", "old one steps aside"])
def test_the_check_notices_an_fsync_that_is_left_out(
    tmp_path: Path, fsync: str, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:
        monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    run = tmp_path / "run"
    killing.prepare(run)
    with Recorder(tmp_path, LOST[fsync]) as recorder:
        killing.act(run)
    assert recorder.problems != []


def test_the_check_notices_bytes_that_are_written_after_the_fsync(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        file = tmp_path / ".tmp-a"
        with file.open("w") as stream:
            stream.write("first")
            stream.flush()
            disk._fsync(file)
            stream.write(" and last")
        file.replace(tmp_path / "a")
        disk._fsync(tmp_path)
    assert recorder.problems == [f"{file}: named a before it was on the disk"]


def test_a_file_is_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        disk.atomic_write(tmp_path / "a", b"new")
        disk.atomic_write(tmp_path / "a", b"newer")
    assert recorder.problems == [] and recorder.renamed == [tmp_path / "a"] * 2


def test_a_heartbeat_costs_no_fsync(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        disk.atomic_write(tmp_path / "status.json", b"{}", durable=False)
    assert len(recorder.problems) == 2 and not recorder._safe


def test_the_metrics_are_on_the_disk_within_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = jsonl.JsonlTracker(path)
    with Recorder(tmp_path) as recorder:
        tracker.log({"step": 1})
        assert path not in recorder._safe
        monkeypatch.setattr(jsonl, "SYNC_SECONDS", 0.0)
        tracker.log({"step": 2})
        assert recorder._safe[path] == path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
        monkeypatch.undo()
        tracker.log({"step": 3})
        assert recorder._safe[path] != path.read_bytes()
        tracker.close()
        assert recorder._safe[path] == path.read_bytes()
