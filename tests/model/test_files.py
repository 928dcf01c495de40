"""Which files of a folder are the model's, and what is refused before anything is read from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.__main__ import main
from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.model.files import INDEX, SINGLE, strays, weights_in
from qlora_trainer.model.fingerprint import base_fingerprint
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.shards import open_files, stored_tensors
from qlora_trainer.model.skeleton import read_configuration
from qlora_trainer.model.source import resolve
from tests import tiny
from tests.plan.sizes import shape_in

CPU = torch.device("cpu")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny.model("llama").save_pretrained(folder, max_shard_size="200KB")
    assert len(weights_in(folder)) > 2
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What lies beside a model's own files; the first would win if it were read, for its name sorts last.
def stale_shard(folder: Path) -> str:
    weights = {name: tensor * 0 for name, tensor in load_file(next(iter(weights_in(folder)))).items()}
    save_file(weights, folder / "model-00009-of-00009.safetensors")
    return "model-00009-of-00009.safetensors"


def another_layout(folder: Path) -> str:
    save_file({"tok_embeddings.weight": torch.zeros(8, 8)}, folder / "consolidated.safetensors")
    return "consolidated.safetensors"


def an_adapter(folder: Path) -> str:
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 8)}, folder / "adapter_model.safetensors")
    return "adapter_model.safetensors"


@pytest.mark.parametrize("put", [stale_shard, another_layout, an_adapter])
def test_what_the_index_does_not_name_is_nobodys(sharded: Path, put: Callable[[Path], str]) -> None:
    files, print_before = weights_in(sharded), base_fingerprint(str(sharded))
    before = load_base(BaseOptions(str(sharded)), CPU).state_dict()
    name = put(sharded)
    assert weights_in(sharded) == files and strays(sharded) == [name]
    assert base_fingerprint(str(sharded)) == print_before
    said: list[str] = []
    after = load_base(BaseOptions(str(sharded)), CPU, said.append).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(said) == 1 and name in said[0] and "not read" in said[0]


def test_the_plan_of_an_unknown_architecture_counts_the_models_own_files(sharded: Path) -> None:
    edit(sharded / "config.json", model_type="llama9")
    before = shape_in(sharded).parameters
    another_layout(sharded)
    assert shape_in(sharded).parameters == before


@pytest.mark.parametrize("left", [0, 4, 1000])
def test_the_fingerprint_of_a_damaged_file_is_one_line(sharded: Path, left: int) -> None:
    first, *_ = weights_in(sharded)
    first.write_bytes(first.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=first.name):
        base_fingerprint(str(sharded))


def test_a_single_file_goes_before_the_shards_beside_it(sharded: Path) -> None:
    tiny.save(sharded, seed=1)
    assert weights_in(sharded) == {sharded / SINGLE: []}
    assert strays(sharded) == sorted(path.name for path in sharded.glob("model-*.safetensors"))


def test_shards_without_their_index_are_named_and_what_to_copy(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    said: list[str] = []
    with pytest.raises(MissingInputError, match=r"there is model-00001-.*copy the index too"):
        load_base(BaseOptions(str(sharded)), CPU, said.append)
    assert said == []


def test_a_tensor_that_two_shards_hold_is_refused_for_nobody_knows_which_is_meant(sharded: Path) -> None:
    first, second, *_ = weights_in(sharded)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor * 0}, second)
    for read in (open_files, lambda files: stored_tensors(files, CPU)):
        with pytest.raises(CheckpointError, match="which of the two"):
            read(weights_in(sharded))


@pytest.mark.parametrize(
    "named", ["/etc/passwd", "../other/model.safetensors", "sub/model.safetensors", "pytorch_model.bin"]
)
def test_an_index_names_safetensors_files_of_its_own_folder(sharded: Path, named: str) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=weight_map | {"model.norm.weight": named})
    with pytest.raises(MissingInputError, match=f"names '{named}'"):
        weights_in(sharded)
    for own_code in (False, True):  # then transformers reads the files
        with pytest.raises(MissingInputError, match=f"names '{named}'"):
            load_base(BaseOptions(str(sharded), trust_remote_code=own_code), CPU)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", "LICENSE"])
def test_a_link_out_of_the_folder_is_refused_by_name(sharded: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (sharded / name).exists():
        (sharded / name).rename(outside)
    else:
        outside.write_text("a secret")
    (sharded / name).symlink_to(outside)
    with pytest.raises(MissingInputError, match=f"{name} is a link to {outside}"):
        resolve(str(sharded))


def test_links_inside_the_folder_and_to_it_are_followed(sharded: Path, tmp_path: Path) -> None:
    (sharded / "LICENSE").write_text("free")
    (sharded / "COPYING").symlink_to("LICENSE")
    (tmp_path / "latest").symlink_to(sharded)
    assert resolve(str(tmp_path / "latest")) == str(tmp_path / "latest")


@pytest.mark.parametrize("store", ["models--some--one/blobs", "blobs/ab"])
def test_the_hubs_cache_is_made_of_links_and_those_are_followed(
    sharded: Path, tmp_path: Path, store: str
) -> None:
    snapshot = tmp_path / "hub" / "models--some--one" / "snapshots" / "0123abcd"
    blobs = tmp_path / "hub" / store
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert resolve(str(snapshot)) == str(snapshot)
    assert len(load_base(BaseOptions(str(snapshot)), CPU).state_dict()) > 20
    (tmp_path / "hub" / "other").write_text("a secret")
    (snapshot / "LICENSE").symlink_to(tmp_path / "hub" / "other")
    with pytest.raises(MissingInputError, match="is a link to"):
        resolve(str(snapshot))


HUGE = 10**9


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": HUGE},
        {"text_config": {"num_hidden_layers": HUGE}},
        {"num_hidden_layers": 1e12},
        {"num_labels": HUGE},
        {"num_local_experts": HUGE},
        {"hidden_size": HUGE},
        {"vocab_size": 10**400},
        {"num_hidden_layers": float("inf")},
    ],
    ids=lambda changes: str(changes)[:40],
)
@pytest.mark.parametrize("weights", [True, False])
def test_sizes_that_no_model_has_are_one_line_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, weights: bool
) -> None:
    folder = tiny.save(tmp_path / "model")
    if not weights:
        (folder / SINGLE).unlink()
    edit(folder / "config.json", **changes)
    (key,) = changes.get("text_config", changes)
    with pytest.raises(MissingInputError, match=f"{key}="):
        resolve(str(folder))
    capsys.readouterr()
    assert main(["plan", "recipe=tiny", f"model.model_name_or_path={folder}"]) == 66
    assert capsys.readouterr().err.count("\n") == 1


def test_as_many_layers_as_the_files_hold_tensors_are_believed(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    edit(folder / "config.json", num_hidden_layers=3000)
    with pytest.raises(
        MissingInputError, match=r"num_hidden_layers=3,000, and the weights beside it are 21 tensors"
    ):
        resolve(str(folder))
    save_file({str(number): torch.zeros(1) for number in range(3000)}, folder / SINGLE)
    assert resolve(str(folder)) == str(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model_type": "llama", "hidden_size": 0, "num_attention_heads": 0}', "no model can be read"),
        (b'{"model_type": "llama", "num_attention_heads": "four"}', "config.json of"),
    ],
)
def test_an_odd_config_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, complaint: str
) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "config.json").write_bytes(text)
    with pytest.raises(MissingInputError, match=complaint):
        load_base(BaseOptions(str(folder)), CPU)
    capsys.readouterr()
    assert main(["plan", "recipe=tiny", f"model.model_name_or_path={folder}"]) == 66
    assert capsys.readouterr().err.count("\n") == 1


LEFT_OVER = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("left", [LEFT_OVER, {"quant_method": "gptq", "bits": 4}])
def test_a_left_over_quantization_config_does_not_make_plain_weights_quantized(
    tmp_path: Path, method: str, left: dict
) -> None:
    folder = tiny.save(tmp_path / "model")
    plain = load_base(BaseOptions(str(folder), method=method), CPU)
    edit(folder / "config.json", quantization_config=left)
    said: list[str] = []
    found = load_base(BaseOptions(str(folder), method=method), CPU, said.append)
    assert len(said) == 1 and "not quantized" in said[0]
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not hasattr(read_configuration(str(folder)), "quantization_config")


def test_a_quantized_checkpoint_says_so_by_its_tensors_and_stays_one(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    load_base(BaseOptions(str(folder)), CPU).save_pretrained(tmp_path / "stored")
    assert hasattr(read_configuration(str(tmp_path / "stored")), "quantization_config")
