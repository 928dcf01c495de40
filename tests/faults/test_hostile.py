"""Files made to run code, to lead elsewhere, or to take for ever are refused; nothing in them runs."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle  # to make the hostile files; the package itself may not (tests/test_safety.py)
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.errors import CheckpointError, QLoRAError
from qlora_trainer.export import card
from qlora_trainer.inference import records
from qlora_trainer.inference.load import load
from qlora_trainer.track.report import write_report
from tests import tiny
from tests.export import runs
from tests.faults.scene import STEPS, Scene


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


def refused(scene: Scene, name: str, mark: Path, *codes: int, **keys: Any) -> str:
    run = scene.start(name, **keys)
    code, text = run.wait(), run.text()
    assert code in codes, text
    assert not mark.exists(), "hostile code has run"
    assert "error: " in text
    return text


def test_the_bomb_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("form", ["pickle", "torch zip"])
def test_pickled_base_weights_are_refused(scene: Scene, mark: Path, tmp_path: Path, form: str) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    else:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
            file.writestr("archive/version", "3\n")
    text = refused(scene, f"pickled-{form[:5]}", mark, 66, model__model_name_or_path=folder)
    assert "safetensors" in text


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(scene: Scene, mark: Path, tmp_path: Path, file: str) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    config = json.loads((folder / file).read_text())
    if file == "config.json":
        classes = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
        config |= {"model_type": "evil", "auto_map": classes}
    else:
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    (folder / file).write_text(json.dumps(config))
    # transformers may also pass the foreign class over and read the plain tokenizer file: harmless.
    run = scene.start(f"code-{file}", model__model_name_or_path=folder)
    code = run.wait()
    assert not mark.exists(), "hostile code has run"
    assert code in ((2, 66) if file == "config.json" else (0, 2, 66)), run.text()


@pytest.mark.parametrize("kind", ["pickle beside", "manifest names pickle", "link out", "template"])
def test_a_hostile_checkpoint_is_refused(scene: Scene, mark: Path, kind: str) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, f"hostile-{kind[:8].strip()}")
    folder = run / "checkpoints" / f"step-{STEPS:06d}"
    file = folder / "optimizer.safetensors"
    if kind == "template":
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}))
    elif kind == "link out":
        file.rename(run.parent / "elsewhere.safetensors")
        file.symlink_to(run.parent / "elsewhere.safetensors")
    else:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    if kind == "manifest names pickle":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["optimizer.pt"] = manifest["files"].pop("optimizer.safetensors")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    text = refused(scene, run.name, mark, 74, checkpoint__resume_from_checkpoint=folder)
    assert "corrupt" in text


def test_a_recipe_cannot_name_code(scene: Scene, mark: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"defaults: [tiny, _self_]\nmodel:\n  _target_: pathlib.Path.touch\n  path: {mark}\n")
    assert "_target_" in refused(scene, "target", mark, 2, recipe=recipe)
    recipe.write_text(f"!!python/object/apply:pathlib.Path.touch [{mark}]\n")
    refused(scene, "yaml", mark, 2, 66, recipe=recipe)


def test_nothing_is_written_outside_the_run_folder(scene: Scene, mark: Path, tmp_path: Path) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "linked")
    outside = tmp_path / "outside"
    (run / "checkpoints").rename(outside)
    (run / "checkpoints").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert "nothing is written outside output_dir" in refused(scene, "linked", mark, 74)
    assert sorted(outside.rglob("*")) == before


def test_an_adapter_folder_that_is_a_link_is_not_written_through(
    scene: Scene, mark: Path, tmp_path: Path
) -> None:
    whole = scene.uninterrupted()
    run = scene.copy(whole.name, "linked-adapter")
    (run / "adapter").rename(tmp_path / "outside")
    (run / "adapter").symlink_to(tmp_path / "outside")
    assert "link" in refused(scene, "linked-adapter", mark, 74)


DEEP = "[" * 100_000 + "]" * 100_000
ROWS = json.dumps([{"instruction": "red", "output": "blue"}] * 4)
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def parquet_bomb(path: Path) -> None:
    """50 million rows in 130 KB."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * (1 << 20), pa.int32()), pa.array(["a"]))
    with pq.ParquetWriter(path, pa.schema([("text", rows.type)])) as writer:
        for _ in range(50):
            writer.write_table(pa.table({"text": rows}))


def written(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


# A file's name and what makes it, the exit code, and what the line says.
DATA = [
    ("a.json", written(DEEP), 65, "nested too deeply"),
    ("b.jsonl", written(f'{{"instruction": "a", "output": "b", "x": {DEEP}}}'), 65, "nested too deeply"),
    (
        "c.json",
        written(f'[{{"instruction": "a", "x": {"9" * 10_000}}}]'),
        65,
        "a number of thousands of digits",
    ),
    (
        "d.jsonl",
        written(f'{{"instruction": "a", "x": {"9" * 10_000}}}'),
        65,
        "a number of thousands of digits",
    ),
    ("e.jsonl.gz", lambda path: path.write_bytes(gzip.compress(bytes(1 << 27))), 65, "300 times its size"),
    ("f.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(b"\n" * (1 << 25)) * 20), 65, "300 times"),
    ("g.parquet", parquet_bomb, 65, "in a file of so few bytes"),
    ("h.parquet", written(b"PAR1" + b"\xff" * 64 + b"PAR1"), 65, "damaged"),
    ("i.jsonl", os.mkfifo, 65, "a pipe or a device"),
    ("j.jsonl", lambda path: path.symlink_to("/dev/zero"), 65, "a pipe or a device"),
    ("k.jsonl", lambda path: path.symlink_to(path), 66, "does not exist"),
    ("l\nerror: forged.json", written(ROWS), 2, r"control characters or no UTF-8 (\n)"),
    ("m\x1b]0;title\x07.json", written(ROWS), 2, r"(\x1b \x07)"),
    (os.fsdecode(b"n\xff.json"), written(ROWS), 2, r"(\udcff)"),
]


@pytest.mark.parametrize(("name", "make", "code", "says"), DATA, ids=lambda value: str(value)[:9])
def test_hostile_data_end_in_one_line(
    scene: Scene, mark: Path, tmp_path: Path, name: str, make: Callable[[Path], Any], code: int, says: str
) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / name)
    text = refused(scene, "hostile-data", mark, code, **{"data.path": tmp_path / "data" / name})
    assert says in text and "\nerror: forged" not in text and not set(text) & set("\x1b\x07")
    if code == 2:  # a folder may hold such a name too
        text = refused(scene, "hostile-data", mark, 65, **{"data.path": tmp_path / "data"})
        assert "its name holds control characters" in text and not set(text) & set("\x1b\x07")


RECIPES = [
    (written(f"defaults: [tiny, _self_]\n{LAUGHS}"), 2, "aliases are written out"),
    (written("lora: &l\n  target_modules: [*l]\n"), 2, "stands inside itself"),
    (written(f"lora: {DEEP}"), 2, "nested more than 100 deep"),
    (written("seed: " + "9" * 10_000), 2, "a number of thousands of digits"),
    (written("#" * 50_000_000), 2, "longer than 256 KiB"),
    (written("a: !!python/object/apply:os.system [id]"), 2, "python/object"),
    (written('track: {project: "a\\e[31m\\nerror: forged"}'), 2, r"(\x1b \n)"),
    (written('"a\\e[31m\\nerror: forged": 1'), 2, r"a\x1b[31m"),
    (written("a: \0"), 2, "not a recipe"),
    (os.mkfifo, 66, "is not a file"),
    (lambda path: path.symlink_to("/dev/zero"), 66, "is not a file"),
]


@pytest.mark.parametrize(("make", "code", "says"), RECIPES, ids=[says for *_, says in RECIPES])
def test_hostile_recipes_end_in_one_line(
    scene: Scene, mark: Path, tmp_path: Path, make: Callable[[Path], Any], code: int, says: str
) -> None:
    make(tmp_path / "recipe.yaml")
    text = refused(scene, "hostile-recipe", mark, code, recipe=tmp_path / "recipe.yaml")
    assert says in text and "\nerror: forged" not in text and "\x1b" not in text


LINES = [
    ({"data.path": "[" * 3000 + "]" * 3000}, "cannot be parsed"),
    ({"seed": "9" * 10_000}, "cannot be parsed"),
    ({"output_dir": "o\nerror: forged"}, r"output_dir: 'o\nerror: forged' holds"),
    ({"output_dir": os.fsdecode(b"o\xff")}, r"(\udcff)"),
    ({"output_dir": "/tmp/" + "o" * 300}, "too long for a path"),
    ({"data.path": "d" * 300 + ".json"}, "too long for a path"),
    ({"model.model_name_or_path": "/m/" * 2000}, "too long for a path"),
]


@pytest.mark.parametrize(("keys", "says"), LINES, ids=[says for _, says in LINES])
def test_hostile_command_lines_end_in_one_line(
    scene: Scene, mark: Path, keys: dict[str, Any], says: str
) -> None:
    assert says in refused(scene, "hostile-line", mark, 2, **keys)


def test_a_launcher_that_counts_in_words_is_told(scene: Scene) -> None:
    run = scene.start("hostile-rank", env={"RANK": "first", "WORLD_SIZE": "two"})
    assert run.wait() == 2 and "error: RANK='first'" in run.text()


def changed(file: str, **fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def added_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def put(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: written(content)(folder / file)


HUGE = struct.pack("<Q", 2**63 - 1) + b"{}"
MODELS = [
    (put("model.safetensors", HUGE), "a header of 9,223,372,036,854,775,807 bytes"),
    (put("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()), "nested too deeply"),
    (put("model.safetensors", b""), "not a readable safetensors file"),
    (put("config.json", DEEP), "nested too deeply"),
    (put("generation_config.json", DEEP), "nested too deeply"),
    (put("generation_config.json", "[]"), "not a JSON object"),
    (put("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id='x' is no token"),
    (put("generation_config.json", '{"eos_token_id": [-5]}'), "eos_token_id=-5 is no token"),
    (put("tokenizer.json", DEEP), "no tokenizer can be read"),
    (added_token, "2147483648: no vocabulary is that large"),
    (changed("config.json", num_hidden_layers=0), "num_hidden_layers=0"),
    (changed("config.json", text_config={"model_type": "llama"}), "a model inside a llama"),
    (changed("config.json", _attn_implementation="evil/kernel"), "no code is run that a model brings"),
    (changed("config.json", text_config={"attn_implementation": {"": "e/k"}}), "no code is run that a model"),
]


@pytest.mark.parametrize(("change", "says"), MODELS, ids=[says for _, says in MODELS])
def test_hostile_models_end_in_one_line(
    scene: Scene, mark: Path, tmp_path: Path, change: Callable[[Path], Any], says: str
) -> None:
    folder = tiny.save(tmp_path / "model")
    change(folder)
    assert says in refused(scene, "hostile-model", mark, 66, model__model_name_or_path=folder)


def test_a_card_of_gigabytes_is_not_read_nor_a_licence_copied(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        with (tmp_path / name).open("wb") as file:
            file.write(b"license: mit\n")
            file.truncate(1 << 40)  # sparse: no disk holds it, and no memory
    (tmp_path / "NOTICE").write_text("short")
    os.mkfifo(tmp_path / "LICENCE.txt")
    assert card.licence_of(tmp_path) == "mit"
    assert card.licence_files(tmp_path) == [tmp_path / "NOTICE"]


ADAPTERS = [
    ({"r": 10**9}, "r is 1000000000"),
    ({"r": "x"}, "r is 'x'"),
    ({"lora_alpha": 1e300}, "lora_alpha"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
    ({"target_modules": "((([a-z._0-9])+)+)+!"}, "ends in reasonable time"),
    ({"target_modules": "["}, "target_modules"),
    ({"target_modules": 5}, "target_modules"),
    ({"exclude_modules": "(a+)+$"}, "exclude_modules"),
    ({"layer_replication": [[0, 100_000]]}, "layer_replication"),
    ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "no module is imported"),
    ({"peft_type": "EVIL"}, "peft_type"),
    ({"peft_type": "PROMPT_TUNING"}, "cannot read the adapter"),
    ({"trainable_token_indices": [10**9]}, "cannot read the adapter"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
]
RECORDS = [
    ("training.json", {"method": "evil"}, 74, "method is 'evil'"),
    ("training.json", {"dtype": None}, 74, "dtype is missing"),
    ("training.json", {"dtype": ["float32"]}, 74, "dtype is ['float32']"),
    ("generation_config.json", {"eos_token_id": [[1]]}, 66, "is no token"),
    ("tokenizer_config.json", {"tokenizer_class": 5}, 66, "no tokenizer can be read"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained one, on a base that is held in 32 bits: quick to load."""
    return runs.make(tmp_path_factory.mktemp("adapter"), method="none").adapter


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.mark.parametrize(("fields", "says"), ADAPTERS, ids=[str(fields)[1:40] for fields, _ in ADAPTERS])
def test_hostile_adapters_end_in_one_line(copied: Path, fields: dict[str, Any], says: str) -> None:
    changed("adapter_config.json", **fields)(copied)
    with pytest.raises(CheckpointError) as caught:
        load(copied)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "fields", "code", "says"), RECORDS, ids=[says for *_, says in RECORDS])
def test_hostile_records_of_an_adapter_end_in_one_line(
    copied: Path, file: str, fields: dict[str, Any], code: int, says: str
) -> None:
    changed(file, **fields)(copied)
    with pytest.raises(QLoRAError) as caught:
        load(copied)
    assert caught.value.exit_code == code and says in str(caught.value)


@pytest.mark.parametrize("file", ["adapter_config.json", "training.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", [DEEP, "[]", "\xff", "9" * 10_000], ids=["deep", "list", "text", "digits"]
)
def test_what_is_no_json_object_is_said(copied: Path, file: str, content: str) -> None:
    (copied / file).write_text(content)
    with pytest.raises(QLoRAError, match="JSON"):
        load(copied)


def test_an_ordinary_foreign_adapter_is_read_with_all_its_fields(copied: Path) -> None:
    """What PEFT 0.21 writes, and what trainers with patterns and automatic mappings do."""
    changed(
        "adapter_config.json",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "evil"},
        rank_pattern={r"model\.layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"layers.0.mlp": 16.0},
        megatron_core="megatron.core",
        loftq_config={},
        layer_replication=None,
        revision=None,
    )(copied)
    (copied / "training.json").unlink()
    assert load(copied).model.peft_config["default"].r == 4
    for pattern in (
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj",
        r"^(?!.*(lm_head|visual)).*(?:q_proj|v_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    ):
        changed("adapter_config.json", target_modules=pattern)(copied)
        assert records.adapter_config(copied)["target_modules"] == pattern


@pytest.mark.parametrize(
    "file", ["config.yaml", "plan.json", "status.json", "evaluation.json", "metrics.jsonl"]
)
@pytest.mark.parametrize(
    "make",
    [written(LAUGHS), written(DEEP), written("[1]"), written('{"step": ' + "9" * 5000 + "}"), os.mkfifo],
    ids=["laughs", "deep", "list", "digits", "pipe"],
)
def test_the_page_is_made_of_whatever_lies_in_the_folder(
    tmp_path: Path, file: str, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / file)
    page = write_report(tmp_path, defaults={}).read_text()
    said = "could not be read" in page or "no record" in page
    assert said or make is os.mkfifo or file == "evaluation.json"
