"""A run's folder is refused to any other configuration, and looking changes nothing in it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qlora_trainer.config import claim
from qlora_trainer.config.load import load
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import CheckpointError, ConfigError, MissingInputError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*changes: str) -> RunConfig:
    return load(["recipe=tiny", "model.model_name_or_path=m", "data.path=d", "output_dir=run", *changes])


def begin(*changes: str, checkpoint: bool = False) -> Path:
    """What a run leaves behind with its first step, or with its first checkpoint."""
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_bytes(claim.configuration(config(*changes)))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    if checkpoint:
        (folder / "checkpoints/step-000001").mkdir(parents=True)
    return folder


def test_looking_makes_nothing(here: Path) -> None:
    claim.refuse(config())
    assert not any(here.iterdir())


def test_the_file_says_what_runs_there(here: Path) -> None:
    begin("lora.r=3")
    assert load(["run=run"], "chat").lora.r == 3


@pytest.mark.parametrize(
    "change",
    [
        "checkpoint.save_steps=1",
        "train.max_steps=9",  # whether the learning rate goes on is asked later
        "evaluate.enabled=true",
        "train.activations=full",
        "model.kernels=reference",  # against auto: what auto came to is compared when it is known
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        "train.per_device_train_batch_size=auto train.gradient_accumulation_steps=4",
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_same_run_comes_back(change: str, checkpoint: bool) -> None:
    begin(checkpoint=checkpoint)
    claim.refuse(config())
    claim.refuse(config(*change.split()))


@pytest.mark.parametrize(
    "change",
    [
        "lora.r=16",
        "seed=7",
        "train.deterministic=true",
        "lora.init_lora_weights=gaussian",
        "quantization.method=none",
        "quantization.bnb_4bit_use_double_quant=false",
        "model.attn_implementation=eager",
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_another_arithmetic_is_refused(change: str, checkpoint: bool) -> None:
    earlier = ["model.attn_implementation=sdpa"] if "attn" in change else []
    folder = begin(*earlier, checkpoint=checkpoint)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="another configuration") as error:
        claim.refuse(config(change))
    assert change.partition("=")[0] in str(error.value)
    assert (folder / "config.yaml").read_bytes() == before
    claim.refuse(config(change, f"checkpoint.allow_change=[{change.partition('=')[0]}]"))
    claim.refuse(config(change, "checkpoint.resume_from_checkpoint=never"))


@pytest.mark.parametrize(
    "change", ["model.model_name_or_path=other", "data.path=[d,e]", "data.template=alpaca"]
)
def test_names_of_models_and_data_are_compared_where_no_checkpoint_knows_their_content(change: str) -> None:
    begin()
    with pytest.raises(ConfigError, match="another configuration"):
        claim.refuse(config(change))
    begin(checkpoint=True)
    claim.refuse(config(change))


def test_a_setting_without_effect_is_no_difference() -> None:
    begin("quantization.method=none")
    claim.refuse(config("quantization.method=none", "quantization.bnb_4bit_use_double_quant=false"))


def test_a_path_of_the_same_file_is_no_difference(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "d").write_text("rows")
    begin()
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    given = ["recipe=tiny", "model.model_name_or_path=m", "data.path=../d", "output_dir=../run"]
    claim.refuse(load(given))


def test_a_start_that_failed_before_its_first_step_protects_nothing() -> None:
    folder = begin("data.path=tyop")
    (folder / "metrics.jsonl").unlink()
    assert not claim.holds_a_run(folder)
    claim.refuse(config("data.path=typo"))


def test_files_of_someone_else_are_left_alone(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        claim.refuse(config())


def test_an_empty_folder_is_taken(here: Path) -> None:
    (here / "run").mkdir()
    claim.refuse(config())


def test_a_full_disk_is_said_before_anything_is_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * 2**30, 9 * 2**30, 2**20))
    with pytest.raises(CheckpointError, match="1 MiB free and a run needs 64 MiB"):
        claim.refuse(config())


@pytest.mark.parametrize("text", ["recipe: [", "null", "- a list", "\x00", "? {a: b}\n: c"])
def test_a_damaged_configuration_of_a_run_is_said(text: str) -> None:
    (begin() / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not readable as a configuration"):
        claim.refuse(config())


def test_a_checkpoint_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(MissingInputError, match="there is no such folder"):
        claim.refuse(config("checkpoint.resume_from_checkpoint=nowhere/step-000001"))
