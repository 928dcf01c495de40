"""List the recipes; with recipe=NAME, show that one as it composes with the keys given."""

from __future__ import annotations

from qlora_trainer.config import recipes
from qlora_trainer.config.load import to_yaml
from qlora_trainer.config.schema import RunConfig


def run(config: RunConfig) -> None:
    """Prints to standard output."""
    if config.recipe is None:
        print(listing())
    else:
        print(to_yaml(config), end="")


def listing() -> str:
    """One line a recipe: its name and the first line of its header."""
    found = recipes.available()
    width = max(map(len, found), default=0)
    return "\n".join(
        f"  {name:<{width}}  {next(iter(recipes.header(path)), '')}" for name, path in sorted(found.items())
    )
