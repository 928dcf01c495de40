"""What makes two starts the same run, by what the schema says of each key: one list for all who ask.

In: a configuration, or the config.yaml of an earlier start. Out: dotted key -> plain value as written, of
the keys that must stay the same. `commands/` settles what is left to the machine (`auto`) and adds what the
files themselves say; `checkpoint/` compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_trainer.config.facts import SAME, Resume
from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.schema import FACTS, RunConfig

DEFAULTS = dict(flat(as_dict(RunConfig())))


def identity(values: Mapping[str, Any], *kinds: Resume) -> dict[str, Any]:
    """Of flat `values`: the keys whose change is refused; one that has no effect counts as at its default.

    Args:
        kinds: of keys; those that must stay the `SAME` if none is given.
    """
    found = {}
    for key, facts in FACTS.items():
        if facts.resume in (kinds or (SAME,)):
            idle = facts.when is not None and not facts.when.holds(values)
            found[key] = DEFAULTS[key] if idle else values[key]
    return found
