"""Recipe and command line -> one frozen, checked `RunConfig`, or every problem at once.

Hydra composes: the schema, then the recipe's ancestors and the recipe (each a ConfigStore node of the
group `recipe`, package `_global_`), then the command line. Before that, names and types are checked one by
one, because Hydra stops at the first problem and takes `+optim.lrr=1` although the schema has no such key.
Nothing is ever instantiated, and nothing is written.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_trainer.config import checks, heirs, keys, recipes
from qlora_trainer.config.frozen import as_dict, freeze
from qlora_trainer.config.recipes import Recipe
from qlora_trainer.config.schema import FACTS, ExportConfig, RunConfig
from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.system import redact


def load(
    arguments: Sequence[str], command: str = "train", say: Callable[[str], None] = lambda line: None
) -> RunConfig:
    """Compose and check the configuration that `arguments` (`key=value`, `recipe=NAME`) ask for.

    `run=FOLDER` takes the place of a recipe: the finished run's `config.yaml`. The result is frozen and
    knows which of its keys were set, and where. `say` takes what the recipe has and whoever names other data
    does not inherit.

    Raises `ConfigError` with every problem found, `MissingInputError` for a recipe or run that is not there.
    """
    arguments = _shorthand(arguments, command)
    overrides = _parse(arguments)
    chain, problems = _recipe_chain(overrides, command)
    run = next((str(o.value()) for o in overrides if o.key_or_group == "run" and o.value() is not None), None)
    overrides = [override for override in overrides if override.key_or_group not in ("recipe", "run")]

    layers: list[dict[str, Any]] = []
    for recipe in chain:
        bad = {key: why for key, value in recipe.values.items() if (why := _recipe_problem(key, value))}
        problems += [f"{recipe.where(key)}: {why}" for key, why in bad.items()]
        layers.append({key: value for key, value in recipe.values.items() if key not in bad})
    for override in list(overrides):
        if why := _override_problem(override):
            problems.append(why)
            overrides.remove(override)
    layers.append({override.key_or_group: override.value() for override in overrides})
    if run is None:  # a run's rows stay those of its adapter, whatever data a command reads
        layers, lines = heirs.disinherit(layers)
        for line in lines:
            say(line)

    config = _compose(
        [_nest(layer) for layer in layers[:-1]], [override.input_line or "" for override in overrides]
    )
    config.run = run
    config.recipe = chain[-1].values.get("recipe") if run else (chain[-1].name if chain else None)
    _fill_in(config)
    names_are_right = not problems
    problems += checks.values(config, command)
    if names_are_right:
        problems += checks.missing(config, command)
    if problems:
        raise_all(problems)
    given = {str(keys.owner(o.key_or_group)) for o in overrides}
    # A run's config.yaml holds every key there is: it says nothing of who set them.
    inherited = {str(keys.owner(key)) for layer in layers[:-1] for key in layer} if run is None else ()
    return freeze(config, given, inherited)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML without secrets; a run folder's `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(redact.tree(as_dict(config))))


def expand_sweep(arguments: Sequence[str], command: str = "train") -> list[list[str]]:
    """All combinations of a sweep's values (`lora.r=8,16 seed=1,2` gives four argument lists).

    Each keeps to a folder of its own: where `output_dir` is not given, it is named after the values that
    vary. Raises `ConfigError` for a sweep without end (`interval(…)`) or with colliding output folders.
    """
    overrides = _parse(arguments)
    choices: list[list[str]] = []
    for override in overrides:
        line = override.input_line or ""
        if not override.is_sweep_override():
            choices.append([line])
        elif override.is_discrete_sweep():
            choices.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{line}: a sweep needs values that can be counted: a,b,c or range(1,4)")
    varying = [options for options in choices if len(options) > 1]
    jobs = [list(job) for job in itertools.product(*choices)]
    given = {override.key_or_group for override in overrides}
    if len(jobs) > 1 and "output_dir" not in given:
        for job in jobs:
            name = ",".join(argument for argument in job if any(argument in options for options in varying))
            recipe = next((a.partition("=")[2] for a in job if a.startswith("recipe=")), "run")
            folder = re.sub(r"[^\w.,=+-]+", "-", name)
            job.append(f"output_dir='outputs/{Path(recipe).stem}-sweep/{folder}'")
    folders: dict[str, list[str]] = {}
    for job in jobs:
        folder = load(job, command).output_dir or ""
        if folder in folders:
            raise ConfigError(
                f"output_dir: {folder} would hold several runs of the sweep; leave output_dir out, or let it "
                "name what varies: 'output_dir=outputs/x-${lora.r}'"
            )
        folders[folder] = job
    return jobs


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `ConfigError`: the problem itself if there is one, else a numbered count and a line each."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    lines = "".join(f"\n  - {problem}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in the configuration:{lines}")


def _shorthand(arguments: Sequence[str], command: str) -> list[str]:
    """`export run=… format=merged`: the section's name, and the brackets of one format, may be left out."""
    if command not in ("export", "verify"):
        return list(arguments)
    own = {field.name for field in fields(ExportConfig)} - {field.name for field in fields(RunConfig)}
    full = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "format" and value and not value.startswith("["):
            value = f"[{value}]"
        full.append(f"export.{key}{equals}{value}" if equals and key in own else argument)
    return full


def _parse(arguments: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed, broken = [], []
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except (HydraException, RecursionError, ValueError):  # also: thousands of brackets, or of digits
            key, equals, value = argument.partition("=")
            if value and value[0] not in "[{'\"" and keys.is_text(key.lstrip("+")) and not value.isdigit():
                # Hydra's grammar has no `~`, `(`, `&` … outside quotes, the paths of users do.
                quoted = value.replace("'", "\\'")
                parsed += parser.parse_overrides([f"{key}='{quoted}'"])
            elif not equals:
                broken.append(f"{argument}: is not key=value; write {argument}=VALUE, or see --help")
            elif "," in value or any(mark in value for mark in "[]{}()\"'"):
                broken.append(
                    f"{key}: {value} cannot be parsed; put the value into quotes: \"{key}='{value}'\""
                )
            else:
                broken.append(f"{argument}: cannot be parsed; expected key=value with a key of the schema")
    if broken:
        raise_all(broken)
    return parsed


def _recipe_chain(overrides: Sequence[Override], command: str) -> tuple[list[Recipe], list[str]]:
    """The recipes to merge, ancestors first: of `recipe=`, or the config.yaml of the run in `run=`."""
    named = {
        kind: [str(o.value()) for o in overrides if o.key_or_group == kind and o.value() is not None]
        for kind in ("recipe", "run")
    }
    problems = [f"{kind}: given {len(v)} times; once is meant" for kind, v in named.items() if len(v) > 1]
    if named["recipe"] and named["run"]:
        problems.append("run: given beside recipe; a run brings its own recipe: drop one of the two")
    elif named["run"]:
        if command == "train":
            problems.append("run: is for evaluate, chat, export and verify; train resumes in output_dir")
        path = Path(named["run"][0]).expanduser() / "config.yaml"
        if not path.is_file():
            raise MissingInputError(
                f"run: {named['run'][0]} has no config.yaml; give the folder of a run, e.g. run=outputs/NAME"
            )
        return recipes.load(str(path)), problems
    return (recipes.load(named["recipe"][0]) if named["recipe"] else []), problems


def _recipe_problem(key: str, value: Any) -> str | None:
    if key == "recipe" and isinstance(value, str | None):
        return None  # what `to_yaml` of an earlier run wrote down
    return keys.problem(key, value)


def _override_problem(override: Override) -> str | None:
    key, line = override.key_or_group, override.input_line or ""
    if key.partition(".")[0] == "hydra":
        return f"{key}: Hydra's own settings are fixed here; drop it"
    if override.is_delete():
        return f"{line}: keys cannot be removed; set {key}=null, or its default, instead"
    if override.package is not None:
        return f"{line}: @package is not used here; write the key alone"
    if override.is_sweep_override():
        return f"{key}: a comma means a sweep; write a list as [a,b], quote a text, or add -m to run them all"
    return keys.problem(key, override.value())


def _compose(bodies: Sequence[dict[str, Any]], lines: Sequence[str]) -> RunConfig:
    store = ConfigStore.instance()
    store.store("schema", RunConfig)
    for index, body in enumerate(bodies):
        inherited = [f"layer_{index - 1}", "_self_"] if index else ["_self_"]
        store.store(f"layer_{index}", {"defaults": inherited, **body}, group="recipe", package="_global_")
    last = f"layer_{len(bodies) - 1}" if bodies else None
    store.store("run", {"defaults": ["schema", {"recipe": last}, "_self_"]})
    try:
        with initialize(config_path=None, version_base="1.3"):
            # `++` sets a key whether or not it is there, as entries of a dictionary (`data.columns`) need;
            # elsewhere it changes nothing, because the names were checked before.
            composed = compose("run", ["++" + line.lstrip("+") for line in lines])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        raise ConfigError(f"{key}: {_first(cause)}" if key else _first(cause)) from error
    assert isinstance(config, RunConfig)
    return config


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key == "recipe":
            continue
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _fill_in(config: RunConfig) -> None:
    """What follows from other keys and from where the command is started: the output folder, and paths."""
    if config.run is not None:
        config.output_dir = config.run
    if config.output_dir is None and config.recipe is not None:
        config.output_dir = f"outputs/{config.recipe}"
    for name in ("output_dir", "run"):
        if (value := getattr(config, name)) is not None:
            setattr(config, name, os.path.expanduser(value))
    for key, facts in FACTS.items():
        if facts.place is not None:
            section, name = key.split(".")
            keys_here = getattr(config, section)
            setattr(keys_here, name, facts.located(getattr(keys_here, name)))
