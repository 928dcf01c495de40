"""Checkpoints are read one tensor at a time, and a damaged one is one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_trainer.errors import CheckpointError
from qlora_trainer.model.shards import DTYPES, ShardReader, stored_tensors

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def write(path: Path, header: object, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("device", DEVICES)
def test_every_dtype_and_shape_comes_back_as_it_was(tmp_path: Path, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in [(), (0, 3), (5,), (3, 7, 2)]
    }
    tensors["several buffers"] = torch.randn(9_000_001, generator=generator)  # 36 MB, no multiple of 16
    save_file(tensors, tmp_path / "a.safetensors")
    reader = ShardReader(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        found = reader.read(name, torch.device(device))
        assert (found.dtype, found.shape, found.device.type) == (tensor.dtype, tensor.shape, device)
        assert torch.equal(found.cpu().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_a_file_passes_through_a_small_buffer_whole(tmp_path: Path) -> None:
    """As on its way to a GPU."""
    tensor = torch.arange(100)
    save_file({"before": torch.ones(3), "a": tensor}, tmp_path / "a.safetensors")
    reader, found = ShardReader(tmp_path / "a.safetensors"), torch.zeros_like(tensor)
    with reader.path.open("rb", buffering=0) as file:
        file.seek(reader.slots["a"].start)
        reader._fill_through(torch.empty(7, dtype=torch.uint8), found.view(torch.uint8), file, "a")
    assert torch.equal(found, tensor)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (["a"], "not a readable safetensors file"),
        ({"a": {}}, "not a readable"),
        ({"a": None}, "not a readable"),
        (entry("F7"), "F7, which is not known here"),
        (entry(shape=(3,)), "8 bytes and shape"),
        (entry(offsets=(-8, 0)), "8 bytes and shape"),
        (entry(offsets=(0, "8")), "not a readable"),
        (entry(shape=(4,), offsets=(0, 16)), "cut short"),
    ],
)
def test_a_header_that_lies_is_one_line(tmp_path: Path, header: object, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as caught:
        ShardReader(write(tmp_path / "a.safetensors", header, b"\0" * 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\xff" * 64, struct.pack("<Q", 4) + b"{]{]"])
def test_what_is_no_safetensors_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        ShardReader(tmp_path / "a.safetensors")


def test_a_file_cut_after_its_header_was_read_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", entry(), b"\0" * 8)
    tensor = stored_tensors({path: []}, CPU)["a"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cut short while reading a"):
        tensor[...]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        tensor[...]


def test_an_index_is_held_to_what_it_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", entry(), b"\0" * 8)
    assert stored_tensors({path: ["a"]}, CPU)["a"].get_shape() == [2]
    with pytest.raises(CheckpointError, match="names b in it and 1 more, which it does not hold"):
        stored_tensors({path: ["a", "b", "c"]}, CPU)
    with pytest.raises(CheckpointError, match="is not there"):
        stored_tensors({tmp_path / "b.safetensors": ["b"]}, CPU)
