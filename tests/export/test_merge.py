"""The merged model is the model that was trained: same logits, whatever was trained and however."""

import json
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.merge import Merge
from qlora_trainer.model.lora import LoraOptions
from tests import tiny
from tests.export import runs

F32 = torch.float32
IDS = torch.arange(6, 60)[None]


def held(run):
    return Held(run.options.method, run.options.double_quant, run.options.dtype)


def merged(run, folder, original=False, dtype=torch.float32):
    base = Base(str(run.base), None, None if original else held(run), runs.CPU)
    folder.mkdir()
    Merge.plan(base, read_updates(run.adapter), dtype).write(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("architecture", "method", "lora"),
    [
        ("llama", "nf4", LoraOptions(r=4, dtype=F32)),
        ("llama", "fp4", LoraOptions(r=4, dtype=F32, use_rslora=True)),
        ("llama", "none", LoraOptions(r=4, dtype=F32, use_dora=True)),
        ("qwen2", "nf4", LoraOptions(r=4, dtype=F32, use_dora=True)),
        ("mistral", "nf4", LoraOptions(r=4, dtype=F32, target_modules=["q_proj", "v_proj"])),
        ("opt", "nf4", LoraOptions(r=4, dtype=F32)),
        ("gemma", "nf4", LoraOptions(r=4, dtype=F32)),
        ("llama", "nf4", LoraOptions(r=4, dtype=F32, modules_to_save=["lm_head", "embed_tokens"])),
        ("llama", "nf4", LoraOptions(r=4, dtype=F32, target_modules=["embed_tokens", "q_proj"])),
    ],
)
def test_merged_is_the_model_that_was_trained(tmp_path, architecture, method, lora):
    run = runs.make(tmp_path, architecture, method, lora)
    trained, base = logits(run.model), None
    with run.model.disable_adapter():
        base = logits(run.model)
    found = logits(merged(run, tmp_path / "merged"))
    assert (trained - base).abs().max() > 0.3
    assert torch.allclose(trained, found, atol=1e-4)


def test_bfloat16_adapters_differ_only_by_the_rounding_between_their_two_products(tmp_path):
    run = runs.make(tmp_path)
    trained = logits(run.model)
    with run.model.disable_adapter():
        moved = (trained - logits(run.model)).pow(2).mean().sqrt()
    error = (trained - logits(merged(run, tmp_path / "merged"))).pow(2).mean().sqrt()
    assert 0 < error < 0.05 * moved


def test_int8_base_merges_up_to_the_rounding_of_its_activations(tmp_path):
    run = runs.make(tmp_path, method="int8", lora=LoraOptions(r=4, dtype=F32))
    trained = logits(run.model)
    with run.model.disable_adapter():
        moved = (trained - logits(run.model)).pow(2).mean().sqrt()
    error = (trained - logits(merged(run, tmp_path / "merged"))).pow(2).mean().sqrt()
    assert error < 0.1 * moved


def test_the_original_weights_give_another_model(tmp_path):
    run = runs.make(tmp_path)
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.base), str(run.adapter)
    ).merge_and_unload()
    original = logits(merged(run, tmp_path / "original", original=True))
    assert torch.allclose(original, logits(plain), atol=1e-5)
    assert (original - logits(run.model)).abs().max() > 0.1


def test_only_layers_that_were_quantized_are_rounded(tmp_path):
    run = runs.make(tmp_path)
    base = Base(str(run.base), None, held(run), runs.CPU)
    quantized = {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.weight"
        for name, module in run.model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and name.endswith("base_layer")
    }
    assert base.quantized == quantized and len(quantized) == 14
    merged(run, tmp_path / "merged")
    before = load_file(run.base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    untouched = [name for name in before if torch.equal(before[name], after[name])]
    assert set(before) - set(untouched) == quantized


def test_the_round_trip_is_what_the_trained_layer_multiplies_with(tmp_path):
    run = runs.make(tmp_path)
    layer = run.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    weight = load_file(run.base / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    as_trained = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(held(run).round_trip(weight), as_trained.float())


def test_tied_embeddings_stay_shared_unless_one_of_them_was_trained(tmp_path):
    run = runs.make(tmp_path / "one", tie_word_embeddings=True)
    model = merged(run, tmp_path / "tied")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")

    lora = LoraOptions(r=4, dtype=F32, modules_to_save=["lm_head"])
    run = runs.make(tmp_path / "two", lora=lora, tie_word_embeddings=True)
    model = merged(run, tmp_path / "untied")
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.allclose(logits(model), logits(run.model), atol=1e-4)


def test_shards_stay_shards_and_their_index_names_every_tensor(tmp_path):
    run = runs.make(tmp_path)
    whole = tiny.model(intermediate_size=128)
    for file in run.base.glob("*.safetensors"):
        file.unlink()
    whole.save_pretrained(run.base, max_shard_size="100KB")
    names = sorted(path.name for path in run.base.glob("*.safetensors"))
    assert len(names) > 2
    found = logits(merged(run, tmp_path / "merged"))
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole.state_dict())
    assert (found - logits(run.model)).abs().max() < 0.05


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_a_stored_checkpoint_is_dequantized_from_its_own_constants(tmp_path, method):
    run = runs.make(tmp_path, method=method, lora=LoraOptions(r=4, dtype=F32))
    trained = logits(run.model)
    with run.model.disable_adapter():
        moved = (trained - logits(run.model)).pow(2).mean().sqrt()
    stored = runs.store(run.base, tmp_path / "stored", method)
    base = Base(str(stored), None, held(run), runs.CPU)
    (tmp_path / "merged").mkdir()
    Merge.plan(base, read_updates(run.adapter), torch.float32).write(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    error = (trained - logits(model)).pow(2).mean().sqrt()
    assert error < (0.1 if method == "int8" else 1e-3) * moved
    with pytest.raises(ConfigError, match="merge_base=original"):
        Base(str(stored), None, None, runs.CPU)


def test_merging_holds_one_weight_not_the_model(tmp_path):
    """Peak memory over what importing takes stays far below the size of the one shard."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    run = runs.make(tmp_path, lora=LoraOptions(r=2), **wide)
    size = (run.base / "model.safetensors").stat().st_size
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from qlora_trainer.export.base import Base, Held\n"
        "from qlora_trainer.export.delta import read_updates\n"
        "from qlora_trainer.export.merge import Merge\n"
        "torch.set_num_threads(1)\n"
        "held = Held('nf4', True, torch.float32)\n"
        "base = Base(sys.argv[1], None, held, torch.device('cpu'))\n"
        "plan = Merge.plan(base, read_updates(Path(sys.argv[2])))\n"
        "base.quantized, held.round_trip(torch.randn(256, 256))\n"
        "status = Path('/proc/self/status')\n"  # getrusage's peak begins with the parent's
        "peak = lambda: int(status.read_text().partition('VmHWM:')[2].split()[0]) * 1024\n"
        "before = peak(); plan.write(Path(sys.argv[3])); print(peak() - before)\n"
    )
    (tmp_path / "merged").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.base), str(run.adapter), str(tmp_path / "merged")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert size > 80e6 and 0 < int(done.stdout) < size / 4


def test_an_adapter_of_another_base_is_refused_with_both_shapes(tmp_path):
    run = runs.make(tmp_path)
    updates = read_updates(run.adapter)
    other = Base(str(tiny.save(tmp_path / "other", intermediate_size=192)), None, None, runs.CPU)
    with pytest.raises(CheckpointError, match=r"mlp.*\[128, 64\].*\[192, 64\]|mlp.*\[64, 128\].*\[64, 192\]"):
        Merge.plan(other, updates)
    opt = Base(str(tiny.save(tmp_path / "opt", "opt")), None, None, runs.CPU)
    with pytest.raises(CheckpointError, match="another base"):
        Merge.plan(opt, updates)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, change, word):
    run = runs.make(tmp_path)
    path = run.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=word):
        read_updates(run.adapter)


def test_a_broken_adapter_file_is_named(tmp_path):
    run = runs.make(tmp_path)
    path = run.adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        read_updates(run.adapter)
    tensors = {
        k: v for k, v in load_file_of(whole, path).items() if "layers.0.self_attn.q_proj.lora_B" not in k
    }
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="half of the update"):
        read_updates(run.adapter)


def load_file_of(raw, path):
    path.write_bytes(raw)
    return load_file(path)


@pytest.mark.parametrize("beside", ["stale shard", "single file", "consolidated", "adapter"])
def test_files_beside_the_bases_own_change_nothing_of_what_is_merged(tmp_path, beside):
    run = runs.make(tmp_path)
    if beside != "single file":
        model = AutoModelForCausalLM.from_pretrained(run.base)
        (run.base / "model.safetensors").unlink()
        model.save_pretrained(run.base, max_shard_size="200KB")
    merged(run, tmp_path / "expected")
    first, *_ = sorted(run.base.glob("*.safetensors"))
    tensors = {name: tensor * 0 for name, tensor in load_file(first).items()}
    if beside == "single file":  # shards of an older save without their index
        save_file(tensors, run.base / "model-00001-of-00002.safetensors")
    elif beside == "stale shard":
        save_file(tensors, run.base / "model-00009-of-00009.safetensors")
    elif beside == "consolidated":
        save_file({"tok_embeddings.weight": torch.zeros(8, 8)}, run.base / "consolidated.safetensors")
    else:
        shutil.copy(run.adapter / "adapter_model.safetensors", run.base)
    merged(run, tmp_path / "found")
    assert {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()
    }


def test_a_base_of_one_shard_becomes_one_file_that_is_found_by_its_name(tmp_path):
    run = runs.make(tmp_path)
    shard = run.base / "model-00001-of-00001.safetensors"
    (run.base / "model.safetensors").rename(shard)
    names = dict.fromkeys(load_file(shard), shard.name)
    (run.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = merged(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert torch.allclose(logits(found), logits(run.model), atol=0.05)
