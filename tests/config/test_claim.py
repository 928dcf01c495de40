"""A run's folder is claimed once and refused to any other configuration."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qlora_trainer.config.claim import claim_output_dir
from qlora_trainer.config.load import load
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*changes: str) -> RunConfig:
    return load(["recipe=tiny", "model.model_name_or_path=m", "data.path=d", "output_dir=run", *changes])


def begin(folder: Path) -> None:
    """What the loop leaves behind with its first step."""
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_the_folder_is_made_and_says_what_runs_in_it(here: Path) -> None:
    folder = claim_output_dir(config("lora.r=3"))
    assert folder == Path("run") and [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load(["run=run"], "chat").lora.r == 3


def test_the_same_configuration_comes_back(here: Path) -> None:
    begin(claim_output_dir(config()))
    claim_output_dir(config())


def test_settings_that_are_not_the_runs_identity_may_change_and_are_written_down(here: Path) -> None:
    begin(claim_output_dir(config("checkpoint.save_steps=1")))
    claim_output_dir(config("checkpoint.save_steps=2"))
    assert load(["run=run"], "chat").checkpoint.save_steps == 2


@pytest.mark.parametrize(
    "change",
    [
        "recipe=llama7b_alpaca",
        "model.model_name_or_path=other",
        f"model.revision={'0' * 40}",
        "data.path=other",
        "data.path=[d,e]",
        "data.name=en",
        "data.split=test",
    ],
)
def test_another_recipe_model_or_data_set_is_refused(here: Path, change: str) -> None:
    folder = claim_output_dir(config())
    begin(folder)
    before = (folder / "config.yaml").read_bytes()
    other = [line for line in ("recipe=tiny",) if not change.startswith("recipe=")]
    arguments = [*other, "model.model_name_or_path=m", "data.path=d", "output_dir=run", change]
    with pytest.raises(ConfigError, match="another configuration"):
        claim_output_dir(load(arguments))
    assert (folder / "config.yaml").read_bytes() == before


def test_a_start_that_failed_before_its_first_step_protects_nothing(here: Path) -> None:
    claim_output_dir(config("data.path=tyop"))
    claim_output_dir(config("data.path=typo"))


def test_files_of_someone_else_are_left_alone(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        claim_output_dir(config())
    assert [path.name for path in (here / "run").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken(here: Path) -> None:
    (here / "run").mkdir()
    claim_output_dir(config())


def test_a_full_disk_is_said_before_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * 2**30, 9 * 2**30, 2**30))
    with pytest.raises(CheckpointError, match=r"1\.0 GiB free and the run needs 2\.0 GiB"):
        claim_output_dir(config(), required_bytes=2 * 2**30)
    assert not (here / "run").exists()
    claim_output_dir(config(), required_bytes=2**20)


def test_a_damaged_configuration_of_a_run_is_not_overwritten(here: Path) -> None:
    folder = claim_output_dir(config())
    begin(folder)
    (folder / "config.yaml").write_text("recipe: [")
    with pytest.raises(ConfigError, match="not readable as a configuration"):
        claim_output_dir(config())
    assert (folder / "config.yaml").read_text() == "recipe: ["
