from __future__ import annotations

import pytest

from qlora_trainer.checkpoint.same import check_same_run
from qlora_trainer.errors import ConfigError

SAVED = {"data": "3fa1", "lora.r": 16, "train.packing": True, "train.max_length": 512, "world_size": 1}


def test_the_same_run_goes_on() -> None:
    check_same_run(SAVED, dict(SAVED))


def test_another_run_is_refused_naming_each_field_and_both_values() -> None:
    with pytest.raises(ConfigError) as error:
        check_same_run(SAVED, SAVED | {"lora.r": 64, "train.packing": False})
    assert "lora.r was 16 and is now 64" in str(error.value)
    assert "train.packing was True and is now False" in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_exceptions_a_user_names_are_made() -> None:
    now = SAVED | {"train.packing": False, "train.max_length": 256, "world_size": 2}
    check_same_run(SAVED, now, ["train", "world_size"])
    with pytest.raises(ConfigError, match=r"train\.max_length was 512"):
        check_same_run(SAVED, now, ["train.packing", "world_size"])
    with pytest.raises(ConfigError, match=r"no field 'train\.pack'"):
        check_same_run(SAVED, now, ["train.pack"])


def test_fields_that_come_or_go_are_differences() -> None:
    with pytest.raises(ConfigError, match="extra was None and is now 1"):
        check_same_run(SAVED, SAVED | {"extra": 1})
    with pytest.raises(ConfigError, match="data was '3fa1' and is now None"):
        check_same_run(SAVED, {key: value for key, value in SAVED.items() if key != "data"})
