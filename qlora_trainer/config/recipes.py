"""Recipes: YAML files that a run starts from, found by name or path, read with their ancestors.

In: `smollm2_demo` or `my/recipe.yaml`. Out: `Recipe`s, ancestor first, each with flat `key: value`
pairs and the line each key stands on. A name is looked up beside the recipe that inherits it, then in
`./recipes` of the user's folder, then among the recipes that come with the package; the nearer hides
the farther, and a recipe may inherit the one it hides:

    # recipes/llama7b_alpaca.yaml in the user's folder
    defaults: [llama7b_alpaca, _self_]
    train: {learning_rate: 1e-4}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_trainer.config.keys import SECTIONS
from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.system import untrusted

MOST_ANCESTORS = 100


@dataclass(frozen=True)
class Recipe:
    name: str
    path: Path
    values: dict[str, Any]  # dotted key -> value, as the file has them
    lines: dict[str, int]  # dotted key -> line, counted from 1

    def where(self, key: str) -> str:
        return f"{shown(self.path)}:{self.lines.get(key, 1)}"


def header(path: Path) -> list[str]:
    """The comment that opens a recipe's file, without its marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def builtin_folder() -> Path:
    """The recipes that come with the package: in a wheel inside it, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def available() -> dict[str, Path]:
    """Every recipe that can be named, the user's own before the built-in one of the same name."""
    folders = (builtin_folder(), Path("recipes"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml")) if path.is_file()}


def load(name: str) -> list[Recipe]:
    """Read a recipe and what it inherits, ancestors first.

    Raises `MissingInputError` for a name or path that does not exist, and `ConfigError` for a file that
    is not a recipe: broken YAML, no mapping, an inheritance in a circle.
    """
    return _lineage(_find(name, None, frozenset()), frozenset())


def _lineage(path: Path, heirs: frozenset[Path]) -> list[Recipe]:
    content, lines = _read(path)
    heirs |= {path.resolve()}
    parents = content.pop("defaults", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{shown(path)}: defaults: a list of recipe names and _self_ is expected")
    if "_self_" in parents[:-1]:
        raise ConfigError(f"{shown(path)}: defaults: _self_ goes last: a recipe overrides what it inherits")
    chain: list[Recipe] = []
    for parent in parents:
        if parent != "_self_":
            chain += _lineage(_find(parent, path, heirs), heirs)
            if len(chain) > MOST_ANCESTORS:
                raise ConfigError(
                    f"{shown(path)}: defaults: over {MOST_ANCESTORS} recipes in all; name fewer"
                )
    return [*chain, Recipe(path.stem, path, dict(_flatten(content)), lines)]


def _find(name: str, heir: Path | None, heirs: frozenset[Path]) -> Path:
    """The file that `name` stands for, never one of `heirs` (so that a recipe can extend its namesake)."""
    by = f"{shown(heir)}: defaults: " if heir else "recipe: "
    if name.endswith((".yaml", ".yml")):
        path = (heir.parent if heir else Path()) / Path(name).expanduser()
        if not path.is_file():
            raise MissingInputError(
                f"{by}{name} is not a file; give the path of a recipe, or the name of one"
            )
        if path.resolve() in heirs:
            raise ConfigError(f"{by}{name} inherits itself; break the circle")
        return path
    folders = [heir.parent] if heir else []
    folders += [Path("recipes"), builtin_folder()]
    found = [path for folder in folders if (path := folder / f"{name}.yaml").is_file()]
    for path in found:
        if path.resolve() not in heirs:
            return path
    if found:
        raise ConfigError(f"{by}{name} inherits itself; break the circle")
    names = available()
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
    raise MissingInputError(f"{by}no recipe is called {name!r}; {hint} (or give a path that ends in .yaml)")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(untrusted.LARGEST_YAML + 1)
        untrusted.check_yaml(text)
        content = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=False)
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{shown(path)}:{line}: broken YAML: {_one_line(error.problem)}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{shown(path)}: not a recipe: {_one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{shown(path)}: not a recipe: {untrusted.few_words(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{shown(path)}: not a recipe: sections with keys (lora: {{r: 16}}) are expected")
    return content, lines  # type: ignore[return-value]


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; what stands in a dictionary-valued key (`data.columns`) stays whole."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (key in SECTIONS or not prefix):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name.start_mark.line + 1
            yield from _lines(value, f"{key}.")


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())


def shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
