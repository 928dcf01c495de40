from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from qlora_trainer.checkpoint import format
from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import disk
from tests.checkpoint import samples

FILES = [*sorted(format.REQUIRED), format.MANIFEST]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.save(tmp_path, 7)


def test_reads_back_bit_for_bit(folder: Path) -> None:
    tensors, documents = samples.contents(7)
    checkpoint = format.read(folder)
    assert checkpoint.step == 7
    for name in (format.ADAPTER, format.OPTIMIZER):
        found = checkpoint.tensors(name)
        assert found.keys() == tensors[name].keys()
        for key, tensor in tensors[name].items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    assert checkpoint.document(format.ADAPTER_CONFIG) == documents[format.ADAPTER_CONFIG]
    assert checkpoint.state == documents[format.STATE]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    places = random.Random(0).sample(range(8 * len(data)), 16)
    for place in places:
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(broken)
        assert any(problem.startswith(name) for problem in format.verify(folder)), place
    (folder / name).write_bytes(data)
    assert format.verify(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_growth_is_detected(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in random.Random(1).sample(range(len(data)), 8):
        (folder / name).write_bytes(data[:length])
        assert format.verify(folder), length
    (folder / name).write_bytes(data + b" ")
    assert format.verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert format.verify(folder) == [f"{name}: missing"]
    with pytest.raises(CheckpointError, match=name):
        format.read(folder)


def _forge(folder: Path, change: dict[str, object], version: int = format.VERSION) -> None:
    """A manifest that is consistent in itself, as one who means harm would write it."""
    files = json.loads((folder / format.MANIFEST).read_bytes())["files"] | change
    files = {name: entry for name, entry in files.items() if entry is not None}
    body = {"files": files, "format_version": version}
    digest = hashlib.sha256(disk.to_json(body)).hexdigest()
    (folder / format.MANIFEST).write_bytes(disk.to_json(body | {"sha256": digest}))


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/passwd", "optimizer.pt", "a/b.json", ".hidden.json", "x.bin", "x.pkl"]
)
def test_a_manifest_names_only_plain_files_that_cannot_run_code(folder: Path, name: str) -> None:
    (folder.parent / "outside.json").write_text("{}")
    entry = {"sha256": hashlib.sha256(b"{}").hexdigest(), "size": 2}
    _forge(folder, {name: entry})
    assert "only plain" in format.verify(folder)[0]


def test_a_forged_manifest_cannot_leave_a_required_file_out(folder: Path) -> None:
    _forge(folder, {format.OPTIMIZER: None})
    assert format.verify(folder) == [f"{format.OPTIMIZER}: not in the manifest"]


def test_a_newer_format_is_refused(folder: Path) -> None:
    _forge(folder, {}, version=format.VERSION + 1)
    assert "format version 2" in format.verify(folder)[0]


def test_links_are_not_followed(folder: Path) -> None:
    (folder / format.STATE).rename(folder.parent / "elsewhere.json")
    (folder / format.STATE).symlink_to(folder.parent / "elsewhere.json")
    assert format.verify(folder) == [f"{format.STATE}: not a regular file"]
    link = folder.parent / "step-000008"
    link.symlink_to(folder, target_is_directory=True)
    assert format.verify(link) == ["not a folder"]


def test_a_renamed_checkpoint_is_refused(folder: Path) -> None:
    moved = folder.rename(folder.with_name("step-000100"))
    with pytest.raises(CheckpointError, match="holds step 7"):
        format.read(moved)
    assert format.read(moved.rename(folder.with_name("my-best"))).step == 7


def test_numbers_that_json_cannot_hold_are_not_written(tmp_path: Path) -> None:
    tensors, documents = samples.contents(1)
    documents[format.STATE]["best_loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        format.write(tmp_path, tensors, documents)


def test_nested_json_bomb_is_a_problem_not_a_crash(folder: Path) -> None:
    (folder / format.MANIFEST).write_text("[" * 100_000)
    assert format.verify(folder)[0].startswith(format.MANIFEST)
