"""Where a model's weights are: one file, shards that an index names, or the same on the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_trainer.errors import MissingInputError
from qlora_trainer.model.source import weight_files
from tests import tiny
from tests.hub import Hub, serving


def shard(folder: Path) -> Path:
    tiny.model("llama").save_pretrained(folder, max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_shards_come_with_what_the_index_names_in_them(tmp_path: Path) -> None:
    files = weight_files(str(shard(tmp_path)))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert files is not None and len(files) > 2
    assert {(path.name, name) for path, names in files.items() for name in names} == {
        (file, name) for name, file in index.items()
    }


def test_a_single_file_goes_before_an_index_as_transformers_has_it(tmp_path: Path) -> None:
    shard(tmp_path)
    tiny.save(tmp_path)
    assert weight_files(str(tmp_path)) == {tmp_path / "model.safetensors": []}


def test_pickled_weights_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingInputError, match="pickled weights are never read"):
        weight_files(str(tmp_path))


# The clients read HF_ENDPOINT when they are imported: a process of its own.
PROGRAM = """
import sys, torch
from qlora_trainer.errors import QLoRAError
from qlora_trainer.model.load import BaseOptions, load_base
for name in sys.argv[1:]:
    try:
        model = load_base(BaseOptions(name, cache_quantized=True), torch.device("cpu"))
        print(model.name_or_path, model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().item())
    except QLoRAError as error:
        print(error.exit_code, error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    shard(tmp_path / "root" / "models" / "someone" / "sharded")
    pickled = tiny.save(tmp_path / "root" / "models" / "someone" / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with serving(tmp_path / "root") as server:
        yield server


def test_shards_of_the_hub_are_downloaded_once_and_then_need_no_network(hub: Hub, tmp_path: Path) -> None:
    def load(*names: str, offline: str = "0") -> tuple[list[str], str]:
        # HF_HUB_OFFLINE as config/preflight.py sets it where the hub does not answer
        environment = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *names], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr

    (first, pickled), said = load("someone/sharded", "someone/pickled")
    assert first.startswith("someone/sharded ") and "is kept in" in said
    assert pickled.startswith("66 model.model_name_or_path: ") and "someone/pickled" in pickled
    fetched = [path for method, path in hub.asked if method == "GET" and "model-00" in path]
    assert len(fetched) == len(set(fetched)) > 2
    hub.reachable = False
    (again, never), said = load("someone/sharded", "someone/else", offline="1")
    assert again == first and "read from" in said
    (lost,), _ = load("someone/sharded")
    assert never.startswith("66 ") and lost.startswith("66 ") and "cannot be reached" in lost
