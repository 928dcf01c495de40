"""A run's configuration is frozen, and remembers which of its keys a user set, and where.

`freeze(config, given, inherited)` returns an equal `RunConfig` that refuses assignment; `with_values` makes
another of it. `as_dict` and `flat` give plain values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, TypeVar

from qlora_trainer.config.schema import FACTS, RunConfig

Section = TypeVar("Section")


class _Frozen:
    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"the configuration is frozen: {name} cannot be assigned")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"the configuration is frozen: {name} cannot be deleted")


def freeze(config: RunConfig, given: Iterable[str] = (), inherited: Iterable[str] = ()) -> RunConfig:
    """A frozen copy; `given` are the dotted keys of the command line, `inherited` those of the recipe."""
    frozen = _rebuild(config)
    vars(frozen)["_given"] = frozenset(given)
    vars(frozen)["_inherited"] = frozenset(inherited)
    return frozen


def given(config: RunConfig) -> frozenset[str]:
    """The dotted keys that the command line set."""
    keys: frozenset[str] = vars(config).get("_given", frozenset())
    return keys


def inherited(config: RunConfig) -> frozenset[str]:
    """The dotted keys that a recipe set."""
    keys: frozenset[str] = vars(config).get("_inherited", frozenset())
    return keys


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with other values for some keys (`section.name`)."""
    made = _copied(config)
    for key, value in values.items():
        section, name = key.split(".")
        assert name in vars(vars(made)[section]), f"no key {key}"
        changed = _copied(vars(made)[section])
        vars(changed)[name] = value
        vars(made)[section] = changed
    return made


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of every key, ready for YAML or JSON."""
    values = {field.name: vars(config)[field.name] for field in fields(config)}
    return {
        name: as_dict(value) if is_dataclass(value) else copy.deepcopy(value)
        for name, value in values.items()
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested ones, as `as_dict` gives them or a `config.yaml` has them.

    What the schema does not know is left whole, and so is what a key holds (`data.columns`).
    """
    for name, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in FACTS:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _copied(section: Section) -> Section:
    made: Section = object.__new__(type(section))
    vars(made).update(vars(section))
    return made


@cache
def _derived(base: type) -> type:
    return type(base.__name__, (_Frozen, base), {})


def _rebuild(section: Section) -> Section:
    """A copy of a dataclass tree whose classes also derive from `_Frozen`."""
    base = next(cls for cls in type(section).__mro__ if cls.__module__ == RunConfig.__module__)
    made: Section = object.__new__(_derived(base))
    for field in fields(section):  # type: ignore[arg-type]
        value = vars(section)[field.name]
        vars(made)[field.name] = _rebuild(value) if is_dataclass(value) else copy.deepcopy(value)
    return made
