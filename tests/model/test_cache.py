"""A quantized base that was kept is the one that was made, and is never taken for another's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.__main__ import main
from qlora_trainer.errors import MissingInputError
from qlora_trainer.model import cache, load
from qlora_trainer.model.assemble import assemble
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.system import cache as system_cache
from qlora_trainer.system import disk
from tests import tiny
from tests.damage import DAMAGE, Damage
from tests.model.test_assemble import assert_same, truncate

CPU = torch.device("cpu")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: the folder that its entries go to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora_trainer" / "quantized"


@pytest.fixture
def options(tmp_path: Path) -> BaseOptions:
    folder = tmp_path / "base"
    tiny.model("qwen2", tie_word_embeddings=True).save_pretrained(folder, max_shard_size="40KB")
    return BaseOptions(str(folder), cache_quantized=True)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each load read, as it comes."""
    read: list[str] = []

    def recorded(source: str, *arguments: object, **named: object) -> object:
        read.append(source)
        return assemble(source, *arguments, **named)

    monkeypatch.setattr(load, "assemble", recorded)
    return read


@pytest.mark.parametrize(
    ("method", "double_quant"),
    [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)],
)
def test_a_kept_base_is_bit_equal_and_read_instead(
    kept: Path, options: BaseOptions, sources: list[str], method: str, double_quant: bool
) -> None:
    options = replace(options, method=method, double_quant=double_quant)
    plain = load_base(replace(options, cache_quantized=False), CPU)
    said: list[str] = []
    first, again = load_base(options, CPU, said.append), load_base(options, CPU, said.append)
    (entry,) = kept.iterdir()
    assert [line.rpartition(" ")[2] for line in said] == [str(entry)] * 2
    assert sources == [options.name_or_path] * 2 + [str(entry / "model")]
    for model in (first, again):
        assert_same(model, plain)
        assert model.name_or_path == model.config.name_or_path == options.name_or_path
        assert model.generation_config.to_dict() == plain.generation_config.to_dict()
        assert model.is_quantized and not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)
    one, other = again.config.to_dict(), plain.config.to_dict()
    assert {key for key in one | other if one.get(key) != other.get(key)} == set()
    assert {path.suffix for path in (entry / "model").iterdir()} == {".json", ".safetensors"}


def same_size_and_date(path: Path) -> None:
    """One weight differs; size and modification time are what they were, as a careful copy leaves them."""
    status, tensors = path.stat(), load_file(path)
    next(tensor for tensor in tensors.values() if tensor.dim() == 2)[1, 1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def other_weights(options: BaseOptions) -> BaseOptions:
    for path in Path(options.name_or_path).glob("*.safetensors"):
        same_size_and_date(path)
    return options


def other_config(options: BaseOptions) -> BaseOptions:
    path = Path(options.name_or_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    return options


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_config,
        lambda options: replace(options, method="fp4"),
        lambda options: replace(options, double_quant=False),
        lambda options: replace(options, dtype=torch.bfloat16),
    ],
)
def test_anything_else_is_quantized_anew(
    kept: Path, options: BaseOptions, sources: list[str], change
) -> None:
    load_base(options, CPU)
    changed = change(options)
    expected = load_base(replace(changed, cache_quantized=False), CPU)
    assert_same(load_base(changed, CPU), expected)
    assert sources == [options.name_or_path] * 3, "what was kept before is of another base"
    assert_same(load_base(changed, CPU), expected)
    assert str(kept) in sources[-1]


def test_other_versions_of_the_libraries_quantize_anew(
    kept: Path, options: BaseOptions, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base(options, CPU)
    monkeypatch.setattr(cache.metadata, "version", lambda name: "99.0")
    load_base(options, CPU)
    assert sources == [options.name_or_path] * 2 and len(list(kept.iterdir())) == 1


def test_the_compute_dtype_is_the_loads_own(kept: Path, options: BaseOptions, sources: list[str]) -> None:
    load_base(options, CPU)
    model = load_base(replace(options, compute_dtype=torch.bfloat16), CPU)
    assert str(kept) in sources[-1]
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "generation_config.json", "record.json"]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(
    kept: Path, options: BaseOptions, sources: list[str], monkeypatch, file: str, damage: Damage
) -> None:
    plain = load_base(options, CPU)
    (folder,) = kept.glob("*/model")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(system_cache, "_checked", set())  # as in another process
    damage(folder / file)
    said: list[str] = []
    assert_same(load_base(options, CPU, said.append), plain)
    assert sources == [options.name_or_path] * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert len(said) == 2 and "is made anew" in said[0] and file in said[0] and "is kept in" in said[1]


def test_what_cannot_be_kept_is_said_and_the_run_goes_on(
    kept: Path, options: BaseOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_base(replace(options, cache_quantized=False), CPU)
    said: list[str] = []

    kept.parent.mkdir(parents=True)
    kept.write_text("a file where the folder should be")
    assert_same(load_base(options, CPU, said.append), plain)
    kept.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        assert_same(load_base(options, CPU, said.append), plain)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(plain), "save_pretrained", full)
        assert_same(load_base(options, CPU, said.append), plain)
    assert len(said) == 3 and all("is not kept: " in line and "\n" not in line for line in said), said
    assert "needs" in said[1] and "No space left" in said[2]
    assert not list(kept.glob("*/model")) and not list(kept.glob("*/.tmp-*"))


def test_what_a_killed_process_left_goes(kept: Path, options: BaseOptions) -> None:
    load_base(options, CPU)
    (entry,) = kept.iterdir()
    (entry / "model").rename(entry / ".tmp-model-12345")
    load_base(options, CPU)
    assert sorted(path.name for path in entry.iterdir()) == [".lock", "model"]


def test_two_processes_at_once_both_load_and_one_keeps(kept: Path, options: BaseOptions) -> None:
    program = (
        "import sys, torch\n"
        "from qlora_trainer.model.load import BaseOptions, load_base\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "model = load_base(BaseOptions(sys.argv[1], cache_quantized=True), torch.device('cpu'))\n"
        "print(model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().item())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, options.name_or_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0] and not any("not kept" in said for _, said in answers)
    (entry,) = kept.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [".lock", "model"]


def test_a_run_that_began_without_goes_on_with_it_and_ends_with_the_same_bytes(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model")
    rows = [{"instruction": f"say {i}", "output": f"it is {i}!"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["recipe=tiny", f"model.model_name_or_path={folder}", f"data.path={tmp_path / 'rows.jsonl'}"]
    for output, *more in [
        ("whole",),
        ("parts", "train.max_steps=2"),
        ("parts", "model.cache_quantized=true", "train.max_steps=3"),
        ("parts", "model.cache_quantized=true"),
    ]:
        assert main([*line, f"output_dir={tmp_path / output}", *more]) == 0
    said = capsys.readouterr().err
    assert "is kept in" in said and "read from" in said and "without effect" not in said
    whole, parts = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_nothing_to_keep_is_said(kept: Path, options: BaseOptions) -> None:
    said: list[str] = []
    load_base(replace(options, method="none"), CPU, said.append)
    assert len(said) == 1 and "nothing to keep" in said[0] and not kept.exists()


def test_a_broken_base_is_one_line_with_the_cache_too(kept: Path, options: BaseOptions) -> None:
    load_base(options, CPU)
    truncate(Path(options.name_or_path))
    with pytest.raises(MissingInputError, match="cut short"):
        load_base(options, CPU)
