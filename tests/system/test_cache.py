"""What is kept proves to be what was written, whatever happened to it since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_trainer.system import cache
from tests.damage import DAMAGE, Damage

RECORD = {"made_of": {"source": "x", "sizes": [1, 2.5]}, "name\udcff": "é"}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "_checked", set())
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 9000)  # more than one block
    (folder / "words.txt").write_text("a few words")
    cache.seal(folder, "record.json", RECORD)
    return folder


def test_what_was_sealed_comes_back(kept: Path, tmp_path: Path) -> None:
    assert cache.sealed(kept, "record.json") == RECORD
    assert cache.sealed(tmp_path / "nowhere", "record.json") is None


@pytest.mark.parametrize("file", ["weights.bin", "words.txt", "record.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_is_found_and_its_file_named(kept: Path, file: str, damage: Damage) -> None:
    damage(kept / file)
    with pytest.raises(cache.DamagedError, match=file):
        cache.sealed(kept, "record.json")


def test_every_bit_of_a_record_counts(kept: Path) -> None:
    path = kept / "record.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert cache.sealed(kept, "record.json") == RECORD  # blanks between values may change
            except cache.DamagedError:
                continue


def test_a_new_file_is_damage_and_a_hidden_one_is_nobodys(kept: Path) -> None:
    (kept / ".nfs0001").write_text("")
    assert cache.sealed(kept, "record.json") == RECORD
    (kept / "model.safetensors").write_text("")
    with pytest.raises(cache.DamagedError, match=r"model\.safetensors is no part"):
        cache.sealed(kept, "record.json")


def test_a_file_in_the_folders_place_is_damage(kept: Path) -> None:
    shutil.rmtree(kept)
    kept.write_text("")
    with pytest.raises(cache.DamagedError):
        cache.sealed(kept, "record.json")


def test_bytes_are_read_once_a_process(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.sealed(kept, "record.json")
    monkeypatch.setattr(cache, "_measure", lambda path: pytest.fail("read again"))
    assert cache.sealed(kept, "record.json") == RECORD


def test_a_record_by_itself_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    assert cache.kept_record(path) is None
    path.write_bytes(cache.with_digest(RECORD))
    assert cache.kept_record(path) == RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_of": {}}))
    with pytest.raises(cache.DamagedError, match=r"scan\.json"):
        cache.kept_record(path)
