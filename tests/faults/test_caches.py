"""The same command after damage to its caches: exit 0, the same adapter, a line that says what was mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_trainer.__main__ import main
from qlora_trainer.system import cache
from tests import tiny
from tests.damage import Damage, deleted, flipped


@pytest.mark.parametrize("damage", [flipped, deleted])
def test_a_run_on_damaged_caches_trains_the_adapter_of_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [
        "recipe=tiny",
        f"model.model_name_or_path={tiny.save(tmp_path / 'model')}",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "model.cache_quantized=true",
        "train.max_steps=1",
    ]

    def adapter(name: str) -> bytes:
        monkeypatch.setattr(cache, "_checked", set())  # as in another process
        capsys.readouterr()
        assert main([*keys, f"output_dir={tmp_path / name}"]) == 0
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    fresh = adapter("fresh")
    kept = [path for path in cache.root().rglob("*") if path.is_file() and not path.name.startswith(".")]
    by_name = {path.name: path for path in kept if path.stat().st_size}
    assert {"tokens.i4", "model.safetensors", "manifest.json", "record.json"} <= by_name.keys()
    for name in ("tokens.i4", "model.safetensors"):
        whole = by_name[name].read_bytes()
        damage(by_name[name])
        assert adapter(f"after {name}") == fresh
        assert by_name[name].read_bytes() == whole
        said = capsys.readouterr().err
        assert said.count(str(by_name[name])) == 1 and said.count("tokenized again") + said.count("anew") == 1
