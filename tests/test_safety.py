"""What no file of the package may do: run code that came with data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_trainer"
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").rglob("*.py")])

MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("torch.serialization", "load"),
    ("torch.hub", "load"),
    ("dist", "all_gather_object"),  # these two pickle what they send
    ("dist", "broadcast_object_list"),
    ("torch.distributed", "all_gather_object"),
    ("torch.distributed", "broadcast_object_list"),
    ("numpy", "load"),
    ("np", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("hydra.utils", "instantiate"),
    ("pd", "read_pickle"),
}
KEYWORDS = {"allow_pickle", "shell"}  # forbidden when anything but False


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [module] if module.split(".")[0] in MODULES else []
                found += [f"{module}.{a.name}" for a in names if (module, a.name) in ATTRIBUTES]
                found += [a.name for a in names if a.name in {"instantiate", "read_pickle"}]
            case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
                found = [name]
            case ast.Attribute(value=value, attr=attribute) if (ast.unparse(value), attribute) in ATTRIBUTES:
                found = [f"{ast.unparse(value)}.{attribute}"]
            case ast.Call(keywords=keywords):
                found = [k.arg for k in keywords if k.arg in KEYWORDS and not _is_false(k.value)]
                found += ["trust_remote_code=True" for k in keywords if _trusts(k)]
            case _:
                found = []
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in found)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _trusts(keyword: ast.keyword) -> bool:
    value = keyword.value
    return keyword.arg == "trust_remote_code" and isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_file_can_run_code_from_data(file: Path) -> None:
    assert list(offences(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec(text)",
        "f = compile",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "from hydra.utils import instantiate",
        "dist.all_gather_object(a, b)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "yaml.load(text)",
    ],
)
def test_the_ban_catches(source: str) -> None:
    assert list(offences(source))


def test_the_ban_lets_ordinary_code_pass() -> None:
    assert not list(offences("model.eval()\nre.compile('x')\nyaml.safe_load(t)\nf(trust_remote_code=c.t)"))
    assert len(FILES) > 20
