"""A run's configuration is frozen, and remembers which of its keys were read.

`watch(config, set_keys)` returns an equal `RunConfig` that refuses assignment and notes every attribute
read; `unread_keys(config)` then says which keys the user set although nothing looked at them. That is
how a key that exists but has no effect (double quantization with `quantization.method=none`) comes to
light. A read is an attribute access anywhere below `commands/`: code that reads everything, whatever
for, defeats the record, so `plain(config)` gives a frozen copy without one (the plan's, which looks at
all keys and acts on none) and `as_dict(config)` reads unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, TypeVar

from qlora_trainer.config.schema import RunConfig

Section = TypeVar("Section")


class _Frozen:
    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"the configuration is frozen: {name} cannot be assigned")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"the configuration is frozen: {name} cannot be deleted")


class _Watched(_Frozen):
    def __getattribute__(self, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        if name in state and name != "_journal":
            prefix, read = state["_journal"]
            read.add(prefix + name)
        return object.__getattribute__(self, name)


def watch(config: RunConfig, set_keys: Iterable[str] = ()) -> RunConfig:
    """A frozen copy of `config` that notes reads; `set_keys` are the dotted keys the user gave."""
    read: set[str] = set()
    watched = _rebuild(config, _Watched, lambda prefix: {"_journal": (prefix, read)})
    vars(watched)["_set_keys"] = frozenset(set_keys)
    return watched


def plain(config: RunConfig) -> RunConfig:
    """A frozen copy of `config` whose reads are not noted."""
    return _rebuild(config, _Frozen, lambda prefix: {})


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with other values for some keys (`section.name`); reads are noted for both."""
    made = _copied(config)
    for key, value in values.items():
        section, name = key.split(".")
        assert name in vars(vars(made)[section]), f"no key {key}"
        changed = _copied(vars(made)[section])
        vars(changed)[name] = value
        vars(made)[section] = changed
    return made


def _copied(section: Section) -> Section:
    made: Section = object.__new__(type(section))
    vars(made).update(vars(section))
    return made


def unread_keys(config: RunConfig) -> list[str]:
    """The keys that a recipe or the command line set and that nothing has read so far, sorted."""
    state = vars(config)
    assert "_journal" in state, "unread_keys: only a watched configuration knows"
    return sorted(state["_set_keys"] - state["_journal"][1])


def set_keys(config: RunConfig) -> frozenset[str]:
    """The dotted keys that a recipe or the command line set."""
    keys: frozenset[str] = vars(config).get("_set_keys", frozenset())
    return keys


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of every key, ready for YAML or JSON; does not count as reading."""
    values = {field.name: vars(config)[field.name] for field in fields(config)}
    return {
        name: as_dict(value) if is_dataclass(value) else copy.deepcopy(value)
        for name, value in values.items()
    }


@cache
def _derived(behaviour: type, base: type) -> type:
    return type(base.__name__, (behaviour, base), {})


def _rebuild(section: Section, behaviour: type, extra: Any, prefix: str = "") -> Section:
    """A copy of a dataclass tree whose classes also derive from `behaviour`."""
    base = next(cls for cls in type(section).__mro__ if cls.__module__ == RunConfig.__module__)
    made: Section = object.__new__(_derived(behaviour, base))
    state = vars(made)
    for field in fields(section):  # type: ignore[arg-type]
        value = vars(section)[field.name]
        if is_dataclass(value):
            value = _rebuild(value, behaviour, extra, f"{prefix}{field.name}.")
        else:
            value = copy.deepcopy(value)
        state[field.name] = value
    state.update(extra(prefix))
    return made
