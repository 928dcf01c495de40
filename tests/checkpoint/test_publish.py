from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_trainer.checkpoint import format, publish
from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import disk
from tests.checkpoint import samples


def test_modes_are_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = samples.save(tmp_path / "checkpoints", 1)
        disk.atomic_write(tmp_path / "status.json", b"{}")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), tmp_path / "status.json"]} == {0o640}


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    samples.save(tmp_path, 3, seed=0)
    folder = samples.save(tmp_path, 3, seed=1)
    master = format.read(folder).tensors(format.OPTIMIZER)["master.a"]
    assert master.equal(samples.contents(3, seed=1)[0][format.OPTIMIZER]["master.a"])
    assert os.listdir(tmp_path) == ["step-000003"]


def test_replaces_also_where_two_names_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    test_saving_the_same_step_again_replaces_it(tmp_path)


def test_an_interrupted_replacement_is_mended_at_the_next_start(tmp_path: Path) -> None:
    folder = samples.save(tmp_path / "checkpoints", 3)
    folder.rename(folder.with_name(".old-step-000003"))
    (folder.parent / ".tmp-step-000003-99").mkdir()
    with disk.lock(tmp_path):
        assert os.listdir(folder.parent) == ["step-000003"]
        assert format.verify(folder) == []


def test_a_failing_fill_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "adapter"

    def fill_before(folder: Path) -> None:
        (folder / "a").write_text("old")

    disk.publish_folder(target, fill_before)

    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*free.*nothing was replaced"):
        disk.publish_folder(target, fill)
    assert os.listdir(tmp_path) == ["adapter"] and (target / "a").read_text() == "old"


def test_needed_and_free_bytes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{10**18:,} bytes and the disk of .* has [\d,]+ free"):
        disk.publish_folder(tmp_path / "a" / "b", lambda folder: None, needed=10**18)
    assert not (tmp_path / "a" / "b").exists()


def test_a_link_or_a_file_is_neither_followed_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapter").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("a user's")
    for name, reason in (("adapter", "a link to .*elsewhere"), ("nowhere", "a link"), ("file", "is a file")):
        with pytest.raises(CheckpointError, match=reason):
            disk.publish_folder(tmp_path / name, lambda folder: None)
    assert (tmp_path / "adapter").is_symlink() and (tmp_path / "file").read_text() == "a user's"
    assert sorted(os.listdir(tmp_path)) == ["adapter", "elsewhere", "file", "nowhere"]


def test_a_place_that_may_not_be_written_to_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.require_place(tmp_path / "new" / "adapter")
    (tmp_path / "checkpoints").mkdir()
    # Modes do not bind root, who runs some tests: what the system would answer another user.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoints")
    for place in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-000001"):
        with pytest.raises(
            CheckpointError, match="checkpoints: Permission denied; see to its owner and mode"
        ):
            disk.require_place(place)


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run is gone: it was moved or removed"):
        samples.save(tmp_path / "run" / "checkpoints", 1)
    assert os.listdir(tmp_path) == []


def test_paths_that_lead_out_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path)
    for path in (run / "checkpoints", run / ".." / "x", run / "checkpoints" / "y"):
        with pytest.raises(CheckpointError, match="leads out"):
            disk.require_inside(run, path)
    linked = tmp_path / "linked"
    linked.symlink_to(run)
    assert disk.require_inside(linked, linked / "exports") == linked / "exports"


def _steps(root: Path) -> list[int | None]:
    return [format.step_of(path) for path in publish.checkpoints(root)]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 1_000_000):
        samples.save(tmp_path, step)
    assert [path.name for path in publish.retain(tmp_path, 2, best_step=2)] == ["step-000001", "step-000003"]
    assert _steps(tmp_path) == [2, 4, 1_000_000]
    assert publish.retain(tmp_path, 0) == []


def test_retention_removes_nothing_unless_the_newest_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        samples.save(tmp_path, step)
    file = tmp_path / "step-000003" / format.OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="corrupt"):
        publish.retain(tmp_path, 1)
    assert _steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("there", "saves", "limit", "best", "copies"),
    [(0, 1, 2, True, 1), (0, 10, 2, False, 3), (0, 10, 2, True, 4), (3, 10, 2, True, 1), (2, 5, 0, True, 5)],
)
def test_space_for_what_exists_at_the_same_time_is_asked_for(
    tmp_path: Path, there: int, saves: int, limit: int, best: bool, copies: int
) -> None:
    for step in range(1, there + 1):
        samples.save(tmp_path, step)
    assert publish.space_needed(tmp_path, 100, saves, limit, best) == 100 * copies


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qlora_trainer.system import disk\n"
        "from qlora_trainer.errors import CheckpointError\n"
        "try: disk.lock(Path(sys.argv[1]))\n"
        "except CheckpointError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with disk.lock(tmp_path):
        held = subprocess.run(command, capture_output=True, text=True)
    assert held.returncode == 1 and "another process is at work" in held.stderr
    assert subprocess.run(command).returncode == 0


# ---- disks that refuse -------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`; skips where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        samples.save(root, 1)
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes .* [\d,]+ free") as refused:
            samples.save(root, 2, size=1_000_000)
        assert refused.value.exit_code == 74
        assert os.listdir(root) == ["step-000001"] and format.verify(root / "step-000001") == []


def test_a_disk_that_fills_while_writing_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "require_space", lambda folder, needed, what: None)
    with small_disk(tmp_path / "disk", "4m") as root:
        samples.save(root, 1)
        with pytest.raises(CheckpointError, match=r"No space left.*[\d,]+ bytes needed, [\d,]+ free"):
            samples.save(root, 2, size=1_000_000)
        assert os.listdir(root) == ["step-000001"] and format.verify(root / "step-000001") == []


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        samples.save(root, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            samples.save(root, 2)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            disk.lock(root)
        assert format.verify(root / "step-000001") == []


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """`RLIMIT_FSIZE` needs no rights: the same promise wherever tests run."""
    samples.save(tmp_path, 1)
    program = (
        "import resource, sys; from pathlib import Path; from tests.checkpoint import samples\n"
        "from qlora_trainer.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "try: samples.save(Path(sys.argv[1]), 2, size=100_000)\n"
        "except CheckpointError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert "File too large" in done.stdout
    assert os.listdir(tmp_path) == ["step-000001"] and format.verify(tmp_path / "step-000001") == []


def test_json_is_canonical() -> None:
    assert disk.to_json({"b": 0.1, "a": "ü"}) == '{\n "a": "ü",\n "b": 0.1\n}\n'.encode()
    assert json.loads(disk.to_json({"x": 0.1 + 0.2}))["x"] == 0.1 + 0.2
