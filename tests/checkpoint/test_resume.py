from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.checkpoint import format, resume
from qlora_trainer.errors import CheckpointError
from tests.checkpoint import samples


def _corrupt(folder: Path) -> None:
    file = folder / format.OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1])


def _no_warning(line: str) -> None:
    pytest.fail(f"warned: {line}")


def test_auto_takes_the_newest_that_verifies_and_names_the_others(tmp_path: Path) -> None:
    for step in (2, 10, 100):
        samples.save(tmp_path / "checkpoints", step)
    _corrupt(tmp_path / "checkpoints" / "step-000100")
    warnings: list[str] = []
    found = resume.find(tmp_path, "auto", warn=warnings.append)
    assert found is not None and found.step == 10
    assert len(warnings) == 1 and "step-000100" in warnings[0] and format.OPTIMIZER in warnings[0]


def test_auto_begins_only_where_nothing_was_saved(tmp_path: Path) -> None:
    assert resume.find(tmp_path, "auto", warn=_no_warning) is None
    _corrupt(samples.save(tmp_path / "checkpoints", 1))
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* corrupt"):
        resume.find(tmp_path, "auto", warn=lambda line: None)
    assert resume.find(tmp_path, "never", warn=_no_warning) is None


def test_leftovers_are_not_checkpoints(tmp_path: Path) -> None:
    folder = samples.save(tmp_path / "checkpoints", 5)
    folder.rename(folder.with_name(".tmp-step-000005-123"))
    assert resume.find(tmp_path, "auto", warn=_no_warning) is None


def test_an_explicit_checkpoint_that_is_corrupt_or_missing_is_an_error(tmp_path: Path) -> None:
    folder = samples.save(tmp_path / "checkpoints", 5)
    found = resume.find(tmp_path, str(folder), warn=_no_warning)
    assert found is not None and found.step == 5
    _corrupt(folder)
    with pytest.raises(CheckpointError, match="corrupt") as error:
        resume.find(tmp_path, str(folder), warn=_no_warning)
    assert error.value.exit_code == 74
    with pytest.raises(CheckpointError, match="not a folder"):
        resume.find(tmp_path, str(tmp_path / "nowhere"), warn=_no_warning)


def test_a_pickle_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match="not a folder"):
        resume.find(tmp_path, str(tmp_path / "state.pt"), warn=_no_warning)


def test_another_timeline_is_moved_aside_and_not_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        samples.save(tmp_path / "checkpoints", step)
    assert resume.set_aside(tmp_path, after=3) is None
    first = resume.set_aside(tmp_path, after=2)
    assert first is not None and [path.name for path in first.glob("checkpoints/*")] == ["step-000003"]
    found = resume.find(tmp_path, "auto", warn=_no_warning)
    assert found is not None and found.step == 2
    second = resume.set_aside(tmp_path, after=None)
    assert second is not None and second != first and len(list(second.glob("checkpoints/*"))) == 2
    assert resume.find(tmp_path, "auto", warn=_no_warning) is None
    assert resume.set_aside(tmp_path, after=None) is None


def test_checkpoints_linked_out_of_the_run_are_refused(tmp_path: Path) -> None:
    samples.save(tmp_path / "other", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="leads out"):
        resume.find(tmp_path / "run", "auto", warn=_no_warning)


def test_starting_over_takes_the_products_along(tmp_path: Path) -> None:
    samples.save(tmp_path / "checkpoints", 1)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "metrics.jsonl").write_text("x")
    (tmp_path / "config.yaml").write_text("seed: 1")
    products = ("adapter", "metrics.jsonl", "exports")
    assert resume.set_aside(tmp_path, 1, products, ["config.yaml"]) is None, "going on is not starting over"
    old = resume.set_aside(tmp_path, None, products, ["config.yaml"])
    assert old == tmp_path / "old-1"
    assert {path.name for path in old.iterdir()} == {"checkpoints", "adapter", "metrics.jsonl", "config.yaml"}
    assert (tmp_path / "config.yaml").read_text() == (old / "config.yaml").read_text()
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.jsonl").exists()
