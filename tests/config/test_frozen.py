"""The configuration is frozen, and knows who set which of its keys."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from qlora_trainer.config.frozen import as_dict, flat, freeze, given, inherited, with_values
from qlora_trainer.config.schema import FACTS, RunConfig


def test_nothing_can_be_assigned() -> None:
    config = freeze(RunConfig())
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    with pytest.raises(FrozenInstanceError):
        config.lora.r = 1
    with pytest.raises(FrozenInstanceError):
        del config.lora.r
    assert isinstance(config, RunConfig) and config == freeze(RunConfig()) and config.seed == 42


def test_it_knows_who_set_what() -> None:
    config = freeze(RunConfig(), ["lora.r"], ["seed"])
    assert given(config) == {"lora.r"} and inherited(config) == {"seed"}
    changed = with_values(config, {"lora.r": 2})
    assert given(changed) == {"lora.r"} and changed.lora.r == 2 and config.lora.r == 64
    assert given(RunConfig()) == inherited(RunConfig()) == frozenset()


def test_the_copy_does_not_share_lists_with_the_original() -> None:
    config = RunConfig()
    frozen = freeze(config)
    config.export.format.append("gguf")
    assert frozen.export.format == ["adapter"]


def test_flat_keys_are_the_schemas() -> None:
    config = RunConfig()
    config.data.columns = {"instruction": "q"}
    config.data.path = {"path": "a.json", "weight": 2}
    values = dict(flat(as_dict(config)))
    assert set(values) == set(FACTS)
    assert values["data.columns"] == {"instruction": "q"} and values["data.path"]["weight"] == 2
