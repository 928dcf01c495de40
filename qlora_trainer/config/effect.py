"""Which keys a user set that change nothing, by what the schema says of them; known before anything runs.

In: a composed configuration and the command. Out: a line for each such key, with the reason.
"""

from __future__ import annotations

from qlora_trainer.config.frozen import as_dict, flat, given, inherited
from qlora_trainer.config.identity import DEFAULTS
from qlora_trainer.config.schema import FACTS, RunConfig

# What they show is a training run: they are given the line that will start it.
PREVIEWS = ("plan", "inspect", "bench")
# They take `run=`: what training does not read, they find in the config.yaml that it leaves.
LATER = ("evaluate", "chat", "export", "verify")
ALL_KEYS = ("report", "recipes")  # the one reads no key, the other shows them all


def without_effect(config: RunConfig, command: str) -> list[str]:
    """`key (reason)` for each key that was set and that `command` does nothing with.

    A recipe's keys are named only where the recipe itself took away their effect: what the command line
    changes, what another command is for, and what is at its default anyway, is not its fault.
    """
    if command in ALL_KEYS:
        return []
    values = dict(flat(as_dict(config)))
    readers = {command, "train"} if command in PREVIEWS else {command}
    found = []
    for key in sorted(given(config) | inherited(config)):
        facts = FACTS[key]
        if readers.isdisjoint(facts.by):
            if key in given(config) and not ("train" in readers and set(LATER) & set(facts.by)):
                found.append(f"{key} ({command} does not read it)")
            continue
        when = facts.when
        if when is None or when.command not in (None, command) or when.holds(values):
            continue
        chosen = values[key] != DEFAULTS[key] and not given(config) & set(when.keys)
        if key in given(config) or chosen:
            found.append(f"{key} (only with {when})")
    return found
