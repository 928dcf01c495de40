"""The configuration is frozen, and knows what was read of it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.watch import as_dict, plain, set_keys, unread_keys, watch

KEYS = ["lora.r", "optim.name", "seed"]


def test_a_key_counts_as_read_when_it_is_looked_at() -> None:
    config = watch(RunConfig(), KEYS)
    assert unread_keys(config) == KEYS
    assert config.lora.r == 64
    assert unread_keys(config) == ["optim.name", "seed"]
    section = config.optim
    assert unread_keys(config) == ["optim.name", "seed"], "a section alone says nothing about its keys"
    getattr(section, "name")  # noqa: B009
    assert unread_keys(config) == ["seed"]


def test_writing_it_down_does_not_count_as_reading() -> None:
    config = watch(RunConfig(), KEYS)
    assert as_dict(config)["lora"]["r"] == 64
    assert plain(config).lora.r == 64 and plain(config).seed == 42
    assert unread_keys(config) == KEYS and set_keys(config) == set(KEYS)


@pytest.mark.parametrize("make", [watch, plain])
def test_nothing_can_be_assigned(make: object) -> None:
    config = make(RunConfig())  # type: ignore[operator]
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    with pytest.raises(FrozenInstanceError):
        config.lora.r = 1
    with pytest.raises(FrozenInstanceError):
        del config.lora.r
    assert isinstance(config, RunConfig) and config.seed == 42


def test_two_runs_do_not_share_what_was_read() -> None:
    one, other = watch(RunConfig(), KEYS), watch(RunConfig(), KEYS)
    one.lora.r  # noqa: B018
    assert unread_keys(other) == KEYS
    assert one == other and one is not other


def test_the_copy_does_not_share_lists_with_the_original() -> None:
    config = RunConfig()
    watched = watch(config)
    config.export.format.append("gguf")
    assert watched.export.format == ["adapter"]
