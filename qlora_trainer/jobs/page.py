"""A run's page, made anew whenever something in the run's folder has changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.config import recipes
from qlora_trainer.config.claim import CONFIG_FILE
from qlora_trainer.config.frozen import as_dict
from qlora_trainer.config.schema import FACTS, RunConfig
from qlora_trainer.errors import QLoRAError
from qlora_trainer.system.terminal import console
from qlora_trainer.track.report import FILE, STRANGE, write_report


def refresh(folder: Path) -> None:
    """Makes the page anew after something in `folder` has changed; does nothing where there is no run.

    No page is worth a run: whatever keeps it from being made is one line.
    """
    if not (folder / CONFIG_FILE).is_file():
        return
    try:
        write(folder)
    except (QLoRAError, OSError, *STRANGE) as error:
        console.print(f"no {FILE}: {type(error).__name__}: {error}", style="yellow")


def write(folder: Path) -> Path:
    return write_report(folder, defaults=as_dict(RunConfig()), recipe_values=_recipe_values)


def _recipe_values(name: str) -> Mapping[str, Any]:
    """Dotted key -> value as the recipe of that name sets it now; empty if it is not to be found any more."""
    values: dict[str, Any] = {}
    try:
        for recipe in recipes.load(name):
            values |= {key: FACTS[key].located(value) for key, value in recipe.values.items() if key in FACTS}
    except QLoRAError:
        return {}
    return values
