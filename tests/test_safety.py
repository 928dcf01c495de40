"""What no file of the package may do: run code that came with data, and write text past the redaction."""

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


# Who writes otherwise than by `disk.write_json` and `disk.write_text`, which mask secrets, and why it may.
WRITERS = {
    "system/disk.py": "is that writer",
    "checkpoint/format.py": "masks documents itself, and its manifest holds names and digests",
    "jobs/training.py": "writes the config.yaml that `to_yaml` has masked",
    "data/page.py": "masks the data and not the script around them",
    "data/scan.py": "masks its record and adds a digest to it",
    "data/store.py": "masks its ledger line by line",
    "export/kquants.py": "opens the log of a worker that masks its output",
    "export/probe.py": "answers `verify` through a private temporary folder",
    "export/quantize.py": "opens the log of a worker that masks its output",
    "export/shards.py": "writes tensors, and an index of their names",
    "export/verify.py": "asks the probe through a private temporary folder: it must know the true paths",
    "system/cache.py": "writes records with digests; whoever calls masks them",
    "track/jsonl.py": "writes numbers",
    "track/report.py": "masks what it reads and not the script around it",
}


def writings(source: str) -> list[str]:
    """Calls that write a file's text or bytes by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="write_text" | "write_bytes" as name, value=value)):
                found += [name] * (ast.unparse(value) != "disk")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="json"), attr="dump")):
                found.append("json.dump")
            case ast.Call(func=ast.Attribute(attr="open") | ast.Name(id="open"), args=args):
                modes = [a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found += [f"open {mode}" for mode in modes if set(mode) <= set("wabx+t")]
            case ast.Call(func=ast.Name(id="atomic_write") | ast.Attribute(attr="atomic_write")):
                found.append("atomic_write")
    return found


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_text_is_written_by_the_one_writer_that_masks_secrets(file: Path) -> None:
    found = writings(file.read_text(encoding="utf-8"))
    assert bool(found) == (str(file.relative_to(PACKAGE)) in WRITERS), found


def test_the_ban_on_writing_catches() -> None:
    for source in (
        "p.write_text(x)",
        "json.dump(x, f)",
        "p.open('w')",
        "open(p, 'ab')",
        "atomic_write(p, x)",
    ):
        assert writings(source), source
    assert not writings("p.open('rb')\nopen(p)\nwrite_text(p, x)\njson.dumps(x)\np.open(mode)")
