"""Recipes, inheritance and the command line become one configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qlora_trainer.config.frozen import given, inherited
from qlora_trainer.config.load import expand_sweep, load, to_yaml
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, MissingInputError

NEEDED = ["model.model_name_or_path=m", "data.path=d"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_later_layers_win(folder: Path) -> None:
    write(folder / "recipes/base.yaml", "lora: {r: 1, lora_alpha: 1}\ntrain: {max_steps: 1}\nseed: 1\n")
    write(folder / "recipes/heir.yaml", "defaults: [base, _self_]\nlora: {r: 2, lora_alpha: 2}\n")
    config = load([*NEEDED, "recipe=heir", "lora.r=3"])
    assert (config.lora.r, config.lora.lora_alpha, config.train.max_steps, config.seed) == (3, 2, 1, 1)
    assert config.recipe == "heir" and config.output_dir == "outputs/heir"
    assert config.optim == load([*NEEDED, "output_dir=o"]).optim, "what no layer sets is the schema's default"


def test_a_recipe_may_extend_its_namesake(folder: Path) -> None:
    write(folder / "recipes/tiny.yaml", "defaults: [tiny, _self_]\nlora: {r: 9}\n")
    config = load([*NEEDED, "recipe=tiny"])
    assert config.lora.r == 9 and config.train.max_steps == 4


def test_several_parents_merge_in_order(folder: Path) -> None:
    write(folder / "recipes/a.yaml", "lora: {r: 1, lora_alpha: 1}\n")
    write(folder / "recipes/b.yaml", "lora: {r: 2}\n")
    write(folder / "recipes/c.yaml", "defaults: [a, b]\n")
    config = load([*NEEDED, "recipe=c"])
    assert (config.lora.r, config.lora.lora_alpha) == (2, 1)


def test_a_recipe_is_found_by_path_and_its_parents_beside_it(folder: Path) -> None:
    write(folder / "elsewhere/parent.yaml", "lora: {r: 7}\n")
    write(folder / "elsewhere/my own.yaml", "defaults: [parent, _self_]\n")
    config = load([*NEEDED, "recipe='elsewhere/my own.yaml'"])
    assert config.lora.r == 7 and config.output_dir == "outputs/my own"


@pytest.mark.parametrize("line", ["seed=7", "+seed=7", "++seed=7", "seed='7'"])
def test_plus_signs_and_quotes_mean_the_same_setting(line: str) -> None:
    assert load([*NEEDED, "output_dir=o", line]).seed == 7


def test_entries_of_a_dictionary_are_set_one_by_one_or_together(folder: Path) -> None:
    write(folder / "recipes/mine.yaml", "data: {columns: {instruction: q}}\n")
    assert load([*NEEDED, "recipe=mine", "data.columns.output=a"]).data.columns == {
        "instruction": "q",
        "output": "a",
    }
    together = load([*NEEDED, "output_dir=o", "data.columns={output: a, instruction: b}"])
    assert together.data.columns == {"output": "a", "instruction": "b"}


def test_a_later_composition_does_not_remember_an_earlier_one() -> None:
    load([*NEEDED, "output_dir=o", "data.columns.output=a", "lora.r=3"])
    config = load([*NEEDED, "output_dir=o"])
    assert config.data.columns == {} and config.lora.r == RunConfig().lora.r


def test_data_sources_keep_their_shape() -> None:
    config = load([NEEDED[0], "output_dir=o", "data.path=[a.json,{path: b.json, weight: 2}]"])
    assert config.data.path == ["a.json", {"path": "b.json", "weight": 2}]


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(["model.model_name_or_path=~/m", "data.path=~/d.json", "output_dir=~/o"])
    assert (config.model.model_name_or_path, config.data.path, config.output_dir) == (
        "/home/me/m",
        "/home/me/d.json",
        "/home/me/o",
    )


def test_paths_mean_the_same_from_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m/config.json", "rows.jsonl", "sub/more.jsonl", "t.jinja", "alpaca/x", "train/x"):
        write(folder / name, "{}")
    paths = "data.path=[rows.jsonl,{path: sub/more.jsonl, weight: 2},builtin:restaurant,someone/set]"
    given = ["model.model_name_or_path=m", paths, "data.template=t.jinja", "data.cache_dir=cache"]
    write(folder / "run/config.yaml", to_yaml(load([*given, "output_dir=run"])))
    monkeypatch.chdir(folder / "sub")
    config = load(["run=../run"], "evaluate")
    assert config.model.model_name_or_path == str(folder / "m")
    assert config.data.path == [
        str(folder / "rows.jsonl"),
        {"path": str(folder / "sub/more.jsonl"), "weight": 2},
        "builtin:restaurant",
        "someone/set",
    ]
    assert config.data.template == str(folder / "t.jinja") and config.data.cache_dir == str(folder / "cache")


def test_names_that_are_no_paths_stay_names(folder: Path) -> None:
    for name in ("alpaca", "train", "auto"):
        (folder / name).mkdir()
    config = load([*NEEDED, "output_dir=o", "data.template=alpaca"])
    assert config.data.template == "alpaca" and config.export.calibration == "train"
    assert config.checkpoint.resume_from_checkpoint == "auto" and config.data.path == "d"


def test_a_path_needs_no_quotes() -> None:
    config = load([*NEEDED, "output_dir=o", "data.path=/a/b (it's 1)&c.json"])
    assert config.data.path == "/a/b (it's 1)&c.json"


def test_to_yaml_is_a_recipe_that_gives_the_same_configuration(folder: Path) -> None:
    config = load(["recipe=smollm2_demo", "lora.r=3", "data.columns.output=a", "output_dir=there"])
    write(folder / "there/config.yaml", to_yaml(config))
    again = load(["run=there"], "chat")
    assert again.run == "there" and again.recipe == "smollm2_demo" and again.output_dir == "there"
    for field in dataclasses.fields(RunConfig):
        if field.name != "run":
            assert getattr(again, field.name) == getattr(config, field.name)


def test_a_run_may_be_measured_with_other_settings(folder: Path) -> None:
    write(folder / "moved/config.yaml", to_yaml(load([*NEEDED, "output_dir=before"])))
    config = load(["run=moved", "evaluate.examples=9"], "evaluate")
    assert given(config) == {"evaluate.examples"} and inherited(config) == set()
    assert config.evaluate.examples == 9 and config.output_dir == "moved"


@pytest.mark.parametrize("command", ["evaluate", "chat", "export", "verify"])
def test_commands_about_a_run_need_one(command: str) -> None:
    with pytest.raises(ConfigError, match=f"run: {command} needs"):
        load([], command)
    assert load(["recipe=tiny"], command).output_dir == "outputs/tiny"


def test_a_null_recipe_is_no_recipe() -> None:
    assert load(["recipe=null", "run=null"], "recipes").recipe is None


def test_interpolation_reaches_other_keys() -> None:
    config = load([*NEEDED, "recipe=tiny", "lora.r=8", "lora.lora_alpha=${lora.r}"])
    assert config.lora.lora_alpha == 8


def test_an_unreadable_run_is_missing_input() -> None:
    with pytest.raises(MissingInputError, match="run: gone has no config"):
        load(["run=gone"], "evaluate")


def test_a_sweep_is_the_product_of_its_values() -> None:
    jobs = expand_sweep([*NEEDED, "recipe=tiny,smollm2_demo", "seed=range(1,3)"])
    folders = [load(job).output_dir for job in jobs]
    assert folders == [
        "outputs/tiny-sweep/recipe=tiny,seed=1",
        "outputs/tiny-sweep/recipe=tiny,seed=2",
        "outputs/smollm2_demo-sweep/recipe=smollm2_demo,seed=1",
        "outputs/smollm2_demo-sweep/recipe=smollm2_demo,seed=2",
    ]


def test_a_sweep_may_name_its_own_folders() -> None:
    jobs = expand_sweep([*NEEDED, "recipe=tiny", "lora.r=2,4", "output_dir=o/r${lora.r}"])
    assert [load(job).output_dir for job in jobs] == ["o/r2", "o/r4"]


def test_the_composed_configuration_is_plain_data(folder: Path) -> None:
    config = load([*NEEDED, "recipe=tiny", "lora.target_modules=[q_proj,v_proj]"])
    assert type(config.lora.target_modules) is list
    assert not any(OmegaConf.is_config(value) for value in vars(config.data).values())
