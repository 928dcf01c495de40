"""The tables of values stay complete and agree with the rooms that use them."""

from __future__ import annotations

import typing

import pytest

from qlora_trainer.config import checks, keys
from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.schema import RunConfig

IN_DATA_OPTIONS = "data."  # that room checks its own
MINUS_ONE_MEANS_NONE = {"train.max_steps"}


def configured(**changes: object) -> RunConfig:
    """The defaults with `section__key=value` changed."""
    config = RunConfig()
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config


def test_the_defaults_have_no_problem() -> None:
    assert checks.values(RunConfig()) == []


def test_every_number_has_a_range() -> None:
    numbers = {
        key
        for key in keys.KEYS
        if {int, float} & {keys._TYPES[key], *typing.get_args(keys._TYPES[key])}
        and not key.startswith(IN_DATA_OPTIONS)
    }
    assert numbers == {*checks.RANGES, *checks.ABOVE_ZERO, *checks.BETAS} | MINUS_ONE_MEANS_NONE


def test_the_tables_name_keys_that_exist() -> None:
    for table in (checks.CHOICES, checks.LISTS, checks.RANGES, checks.ABOVE_ZERO, checks.BETAS):
        assert set(table) <= set(keys.KEYS)


def test_defaults_are_among_the_choices() -> None:
    values = dict(flat(as_dict(RunConfig())))
    for key, allowed in checks.CHOICES.items():
        assert values[key] in allowed


def test_every_alias_names_a_key_of_ours_and_hides_none() -> None:
    for alias, ours in keys.ALIASES.items():
        assert ours.split("=")[0].split(" ")[0] in keys.KEYS, alias
        # `batch_size` alone means training's to everyone, though evaluate has a key of that name.
        assert alias == "batch_size" or not any(key.endswith(f".{alias}") for key in keys.KEYS), alias


@pytest.mark.parametrize("command", ["evaluate", "chat", "export"])
def test_float16_is_refused_only_where_gradients_flow(command: str) -> None:
    config = configured(model__dtype="float16")
    assert checks.values(config, command) == []
    assert len(checks.values(config, "train")) == 1


def test_dora_on_layers_without_it_is_refused() -> None:
    found = checks.values(configured(lora__use_dora=True, quantization__method="gptq"))
    assert any(line.startswith("lora.use_dora: PEFT has no DoRA on gptq layers") for line in found)
    assert checks.values(configured(lora__use_dora=True, quantization__method="int8")) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"quantization__method": "awq"}, "quantization.method"),
        ({"model__attn_implementation": "flash_attention_2"}, "model.attn_implementation"),
        ({"track__report_to": ["wandb"]}, "track.report_to"),
        ({"evaluate__lm_eval_tasks": ["arc_easy"]}, "evaluate.lm_eval_tasks"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_remedy(
    change: dict[str, object], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = "evaluate" if key.startswith("evaluate.") else "train"
    (line,) = checks.values(configured(**change), command)
    assert line.startswith(f"{key}: needs the package ") and "pip install" in line
    assert all(checks.values(configured(**change), command) == [] for command in ("plan", "inspect"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa_niter_4", "olora"])
def test_initialisations_that_peft_can_do_here_pass(init: object) -> None:
    assert checks.values(configured(lora__init_lora_weights=init, quantization__method="none")) == []
