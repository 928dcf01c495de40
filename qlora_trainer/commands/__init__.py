"""One module a command: `run(config)` is the only place where the configuration meets the rooms.

The list of commands is this folder: a command exists when its module does and has a `run`. Its help is the
first line of the module's docstring.
"""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

ORDER = ("train", "plan", "inspect", "evaluate", "chat", "export", "verify", "report", "bench", "recipes")


def available() -> dict[str, str]:
    """Commands that exist and what each is for; nothing is imported to find out."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        tree = ast.parse((Path(__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    in_order = [name for name in ORDER if name in found] + sorted(found.keys() - ORDER)
    return {name: found[name] for name in in_order}
