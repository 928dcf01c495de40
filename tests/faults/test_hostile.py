"""Files made to run code, or to lead elsewhere, are refused; nothing in them runs."""

from __future__ import annotations

import json
import pickle  # to make the hostile files; the package itself may not (tests/test_safety.py)
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.faults.scene import STEPS, Scene


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


def refused(scene: Scene, name: str, mark: Path, *codes: int, **keys: Any) -> str:
    run = scene.start(name, **keys)
    code, text = run.wait(), run.text()
    assert code in codes, text
    assert not mark.exists(), "hostile code has run"
    assert "error: " in text
    return text


def test_the_bomb_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("form", ["pickle", "torch zip"])
def test_pickled_base_weights_are_refused(scene: Scene, mark: Path, tmp_path: Path, form: str) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    else:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
            file.writestr("archive/version", "3\n")
    text = refused(scene, f"pickled-{form[:5]}", mark, 66, model__model_name_or_path=folder)
    assert "safetensors" in text


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(scene: Scene, mark: Path, tmp_path: Path, file: str) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    config = json.loads((folder / file).read_text())
    if file == "config.json":
        classes = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
        config |= {"model_type": "evil", "auto_map": classes}
    else:
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    (folder / file).write_text(json.dumps(config))
    # transformers may also pass the foreign class over and read the plain tokenizer file: harmless.
    run = scene.start(f"code-{file}", model__model_name_or_path=folder)
    code = run.wait()
    assert not mark.exists(), "hostile code has run"
    assert code in ((2, 66) if file == "config.json" else (0, 2, 66)), run.text()


@pytest.mark.parametrize("kind", ["pickle beside", "manifest names pickle", "link out", "template"])
def test_a_hostile_checkpoint_is_refused(scene: Scene, mark: Path, kind: str) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, f"hostile-{kind[:8].strip()}")
    folder = run / "checkpoints" / f"step-{STEPS:06d}"
    file = folder / "optimizer.safetensors"
    if kind == "template":
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}))
    elif kind == "link out":
        file.rename(run.parent / "elsewhere.safetensors")
        file.symlink_to(run.parent / "elsewhere.safetensors")
    else:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    if kind == "manifest names pickle":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["optimizer.pt"] = manifest["files"].pop("optimizer.safetensors")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    text = refused(scene, run.name, mark, 74, checkpoint__resume_from_checkpoint=folder)
    assert "corrupt" in text


def test_a_recipe_cannot_name_code(scene: Scene, mark: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"defaults: [tiny, _self_]\nmodel:\n  _target_: pathlib.Path.touch\n  path: {mark}\n")
    assert "_target_" in refused(scene, "target", mark, 2, recipe=recipe)
    recipe.write_text(f"!!python/object/apply:pathlib.Path.touch [{mark}]\n")
    refused(scene, "yaml", mark, 2, 66, recipe=recipe)


def test_nothing_is_written_outside_the_run_folder(scene: Scene, mark: Path, tmp_path: Path) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "linked")
    outside = tmp_path / "outside"
    (run / "checkpoints").rename(outside)
    (run / "checkpoints").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert "nothing is written outside output_dir" in refused(scene, "linked", mark, 74)
    assert sorted(outside.rglob("*")) == before


def test_an_adapter_folder_that_is_a_link_is_not_written_through(
    scene: Scene, mark: Path, tmp_path: Path
) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "linked-adapter")
    (run / "adapter").rename(tmp_path / "outside")
    (run / "adapter").symlink_to(tmp_path / "outside")
    assert "link" in refused(scene, "linked-adapter", mark, 74)
