"""A base assembled from its files is what transformers loads, bit for bit, and takes little memory."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from qlora_trainer.errors import MissingInputError
from qlora_trainer.model.assemble import assemble
from qlora_trainer.model.load import BaseOptions, load_base
from tests import tiny

CPU = torch.device("cpu")
QUANTIZATIONS = {
    "none": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 twice": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4 twice": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# Beside the families of every test: transposed linear layers, and experts that transformers fuses.
FAMILIES = {
    "llama": {},
    "gemma3_text": dict(tiny.ARCHITECTURES["gemma2"]),
    "qwen2": dict(tie_word_embeddings=True),
    "opt": {},
    "phi3": {},
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=263, n_positions=64),
    "mixtral": dict(tiny.GATED, num_local_experts=4, num_experts_per_tok=2),
}


def save(folder: Path, family: str, shard: str = "5GB", dtype: torch.dtype = torch.bfloat16) -> Path:
    if family in tiny.ARCHITECTURES:
        model = tiny.model(family, **FAMILIES[family])
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]))
    model.generation_config = GenerationConfig(max_length=77)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def contents(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor: parameters, quantization constants, buffers that are saved and that are not."""
    return model.state_dict() | {f"buffer {name}": value for name, value in model.named_buffers()}


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    found, expected = contents(one), contents(other)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]


@pytest.mark.parametrize(
    ("family", "method", "shard"),
    [
        *(("llama", method, "40KB") for method in QUANTIZATIONS),
        *((family, "nf4 twice", "5GB") for family in FAMILIES),
        ("gpt2", "int8", "5GB"),
        ("mixtral", "none", "60KB"),
        ("qwen2", "none", "40KB"),
    ],
)
def test_every_bit_is_transformers_own(tmp_path: Path, family: str, method: str, shard: str) -> None:
    folder = save(tmp_path, family, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (shard != "5GB")
    quantization = QUANTIZATIONS[method]
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    said: list[str] = []
    found = assemble(
        str(folder), AutoConfig.from_pretrained(folder), CPU, quantization=quantization, say=said.append
    )
    assert_same(found, expected)
    assert not said and not found.training
    assert found.generation_config.max_length == expected.generation_config.max_length == 77
    assert found.name_or_path == found.config.name_or_path == str(folder)
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied == bool(found.config.tie_word_embeddings)
    one, other = found.config.to_dict(), expected.config.to_dict()
    assert {key for key in one | other if one.get(key) != other.get(key)} <= {"_name_or_path"}


@pytest.mark.parametrize("method", ["nf4 twice", "fp4", "int8"])
def test_a_stored_quantized_checkpoint_keeps_its_bits(tmp_path: Path, method: str) -> None:
    quantization = QUANTIZATIONS[method]
    plain = save(tmp_path / "plain", "qwen2")
    first = assemble(str(plain), AutoConfig.from_pretrained(plain), CPU, quantization=quantization)
    first.save_pretrained(tmp_path / "stored", max_shard_size="40KB")
    said: list[str] = []
    config = AutoConfig.from_pretrained(tmp_path / "stored")
    again = assemble(str(tmp_path / "stored"), config, CPU, say=said.append)
    assert_same(again, first)
    assert not said


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nf4 twice", "fp4", "int8", "none"])
def test_a_gpu_gets_the_same_bits_and_never_the_16_bit_model(shards: Path, method: str) -> None:
    device, quantization = torch.device("cuda", 0), QUANTIZATIONS[method]
    gc.collect()  # what another test left must not go while this one measures
    torch.cuda.reset_peak_memory_stats()
    found = assemble(
        str(shards),
        AutoConfig.from_pretrained(shards),
        device,
        dtype=torch.bfloat16,
        quantization=quantization,
    )
    beyond = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    assert beyond < max(path.stat().st_size for path in shards.glob("*.safetensors"))
    assert all(p.device == device for p in found.parameters())
    expected = AutoModelForCausalLM.from_pretrained(
        shards, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
    )
    assert_same(found, expected)


MEASURE = """
import sys, torch, transformers.models.llama.modeling_llama
from qlora_trainer.model.load import DTYPES, BaseOptions, load_base
from qlora_trainer.model.shards import release_freed

def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))

def load(folder, method, dtype):
    options = BaseOptions(folder, method=method, dtype=DTYPES[dtype], compute_dtype=DTYPES[dtype])
    return load_base(options, torch.device("cpu"))

folder, small, *wanted = sys.argv[1:]
for method, dtype in (item.split() for item in wanted):
    load(small, method, dtype)  # what a first load imports
    release_freed()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    model = load(folder, method, dtype)
    stays = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            stays += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    print(resident("VmHWM") - before - stays)
    del model
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """168 MB in shards of 34 MB, whose largest tensors have 2 MB."""
    config = CONFIG_MAPPING["llama"](
        hidden_size=512, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=8, vocab_size=512
    )
    folder = tmp_path_factory.mktemp("shards")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="34MB")
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) >= 5 and sum(sizes) > 4.5 * max(sizes)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_peak_memory_beyond_the_model_is_under_1_3_of_the_largest_shard(shards: Path, tmp_path: Path) -> None:
    """Resident memory, mapped files counted: what `top` and a container's limit see."""
    largest = max(path.stat().st_size for path in shards.glob("*.safetensors"))
    wanted = ["nf4 float32", "nf4 bfloat16", "int8 bfloat16", "none bfloat16"]
    command = [sys.executable, "-c", MEASURE, str(shards), str(save(tmp_path, "llama")), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = dict(zip(wanted, map(int, done.stdout.split()), strict=True))
    assert all(peak < 1.3 * largest for peak in peaks.values()), f"{peaks} for shards of {largest:,} bytes"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), "llama", "40KB")


def index_of(folder: Path) -> tuple[Path, dict]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def lose_all(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def name_a_tensor_too_many(folder: Path) -> None:
    path, index = index_of(folder)
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    index_of(folder)[0].write_text('{"weight_map": [1]}')


def drop_a_tensor(folder: Path) -> None:
    path, index = index_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    path.write_text(json.dumps(index))


def config_says(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return change


@pytest.mark.parametrize("method", ["nf4", "none"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, r"model-00002-of-\d+\.safetensors: cut short at [\d,]+ bytes of [\d,]+"),
        (lose_a_shard, r"model-00002-of-\d+\.safetensors: .* not there"),
        (lose_all, "neither model.safetensors nor model.safetensors.index.json"),
        (name_a_tensor_too_many, r"names model\.layers\.7\.mlp\.up_proj\.weight in it"),
        (break_the_index, "not an index of shards"),
        (drop_a_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight is missing;"),
        (config_says("num_hidden_layers", 3), r"model\.layers\.2\.\S+ is missing, and 8 more;"),
        (
            config_says("intermediate_size", 192),
            r"is \[(64, 128|128, 64)\], asked for is \[(64, 192|192, 64)\]",
        ),
        (config_says("vocab_size", 300), r"is \[263, 64\], asked for is \[300, 64\]"),
        (
            config_says("num_attention_heads", 3),
            r"config\.json of .* not a multiple of the number of attention heads",
        ),
        (config_says("num_hidden_layers", "two"), r"config\.json of .* expected int, got str"),
    ],
)
def test_a_broken_checkpoint_is_one_line(
    tmp_path: Path, whole: Path, method: str, damage: Callable[[Path], None], complaint: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    with pytest.raises(MissingInputError, match=complaint) as caught:
        load_base(BaseOptions(str(folder), method=method), CPU)
    assert "\n" not in str(caught.value)


def test_stored_tensors_that_the_model_has_no_place_for_are_said(tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    config_says("num_hidden_layers", 1)(folder)
    said: list[str] = []
    model = load_base(BaseOptions(str(folder)), CPU, said.append)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert len(said) == 1 and "9 stored tensors, such as model.layers.1." in said[0]
