"""Each format's folder: whole, loadable by plain libraries, and kept or refused when it is there already."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.formats import Exporter, _without_paths
from qlora_trainer.export.quantize import QuantizeOptions
from qlora_trainer.export.snippet import base_name
from qlora_trainer.export.source import ExportOptions
from qlora_trainer.model.load import keep_unpacked
from tests import tiny
from tests.export import runs
from tests.export.test_verify import exporter, source

IDS = torch.arange(6, 60)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("formats"))


def kl(run, model):
    with torch.no_grad():
        trained, found = (m(IDS).logits.float().log_softmax(-1) for m in (run.model, model))
    return float((trained.exp() * (trained - found)).sum(-1).mean())


@pytest.mark.parametrize(("kind", "bound", "share"), [("int8", 1e-4, 0.6), ("nf4", 5e-3, 0.6)])
def test_bitsandbytes_checkpoints_load_as_they_are(run, kind, bound, share):
    exports = exporter(run)
    folder = exports.export(kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    keep_unpacked(model)
    linear = model.model.layers[0].mlp.down_proj
    assert type(linear).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
    assert type(model.lm_head).__name__ == "Linear"
    assert kl(run, model) < bound
    merged = exports.export("merged")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, merged)]
    assert sizes[0] < share * sizes[1]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_holds_the_same_model_the_vocabulary_and_the_template(tmp_path, architecture):
    run = runs.make(tmp_path, architecture)
    folder = exporter(run, gguf_type="f16").export("gguf")
    model = runs.load_gguf(folder)
    assert kl(run, model) < 1e-4
    fields = gguf.GGUFReader(folder / "model-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tiny.CHATML
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = run.tokenizer.get_vocab()
    assert {token: i for i, token in enumerate(tokens) if not token.startswith("[PAD")} == vocabulary
    assert fields["tokenizer.ggml.eos_token_id"].contents() == run.tokenizer.eos_token_id


def test_gguf_quantizes_layers_and_keeps_norms(run):
    folder = exporter(run, gguf_type="q4_1").export("gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(folder / "model-q4_1.gguf").tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_1
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["blk.0.attn_norm.weight"].data.dtype == np.float32


def test_what_gguf_cannot_hold_is_refused_before_writing(tmp_path):
    run = runs.make(tmp_path, "opt")
    with pytest.raises(ConfigError, match="opt is not supported"):
        exporter(run).check(["gguf"])
    narrow = runs.make(tmp_path / "narrow", method="none", hidden_size=48, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"48 weights, not a multiple of 32"):
        exporter(narrow).check(["gguf"])


def test_every_folder_has_tokenizer_stops_licence_and_card(tmp_path):
    run = runs.make(tmp_path)
    (run.base / "LICENSE").write_text("free as in birds")
    exports = exporter(run)
    for kind in ("merged", "nf4", "gguf"):
        folder = exports.export(kind)
        assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [5]
        assert (folder / "LICENSE").read_text() == "free as in birds"
        assert "Not measured yet." in (folder / "README.md").read_text()


def test_a_finished_export_is_kept_and_another_one_refused(tmp_path):
    run = runs.make(tmp_path)
    folder = exporter(run).export("merged")
    marked = folder / "model.safetensors"
    before = marked.stat().st_mtime_ns
    again = exporter(run)
    again.check(["merged"])
    assert again.export("merged") == folder and marked.stat().st_mtime_ns == before
    other = exporter(run, merge_base="original")
    with pytest.raises(ConfigError, match=r"exists .* export\.overwrite=true"):
        other.check(["merged"])
    replacing = exporter(run, merge_base="original", overwrite=True)
    replacing.check(["merged"])
    replacing.export("merged")
    assert json.loads((folder / "export.json").read_text())["merge_base"] == "original"


def test_an_interrupted_export_leaves_nothing_that_looks_finished(tmp_path):
    run = runs.make(tmp_path)

    def interrupt(kind):
        def progress(done, total):
            raise KeyboardInterrupt

        return progress

    root = run.adapter.parent / "exports"
    stopped = Exporter(source(run), ExportOptions(), root, runs.CPU, list, interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.export("merged")
    assert list(root.iterdir()) == []
    assert (exporter(run).export("merged") / "model.safetensors").is_file()


def test_no_space_is_said_before_the_first_byte(tmp_path, monkeypatch):
    run = runs.make(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: __import__("types").SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes .* 1,000 free"):
        exporter(run).check(["merged", "nf4"])
    assert not (run.adapter.parent / "exports").exists()


def test_a_base_that_changed_since_training_is_refused(tmp_path):
    run = runs.make(tmp_path)
    tiny.model(seed=9, intermediate_size=128).save_pretrained(run.base)
    with pytest.raises(CheckpointError, match=r"fingerprint sha256:\w+…, but .* has sha256:\w+…"):
        exporter(run).check(["merged"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (QuantizeOptions("awq", bits=3), "export.bits=3: awq is done with 4 bits"),
        (QuantizeOptions("gptq", bits=5), "3, 4, 8 bits"),
        (
            QuantizeOptions("gptq", group_size=48),
            r"group_size=48 does not divide .*down.* 128 .*32, 64 or -1",
        ),
    ],
)
def test_what_quantizers_cannot_do_is_refused_with_the_layer(options, word):
    linears = {"layers.0.down.weight": (64, 128), "layers.0.up.weight": (128, 64)}
    with pytest.raises(ConfigError, match=word):
        options.check(linears)


@pytest.mark.parametrize(
    ("kind", "options", "made", "named"),
    [
        ("gptq", {}, "GPTQ, 4 bits, groups of 128, symmetric", "GPTQConfig(bits=4, backend='gptq_triton')"),
        (
            "gptq",
            {"bits": 3, "group_size": -1, "sym": False, "desc_act": True},
            "GPTQ, 3 bits, whole rows, asymmetric, desc_act",
            "GPTQConfig(bits=3, backend='gptq_torch')",
        ),
        ("rtn", {"bits": 8}, "RTN, 8 bits", "GPTQConfig(bits=8, backend='gptq_triton')"),
        ("awq", {"group_size": 64}, "AWQ, 4 bits, groups of 64", "AwqConfig(bits=4, backend='gemm_triton')"),
    ],
)
def test_a_card_says_how_it_was_quantized_and_which_kernel_suits_any_width(run, kind, options, made, named):
    card = exporter(run, **options)._card(kind)
    assert f"then quantized: {made}" in card.made
    assert named in card.load


def test_a_card_of_what_needs_no_kernel_names_none(run):
    assert "backend" not in exporter(run)._card("merged").load


def test_no_folder_of_this_machine_is_in_what_is_passed_on(tmp_path):
    run = runs.make(tmp_path)
    exports = exporter(run)
    folders = [run.adapter, *(exports.export(kind) for kind in ("adapter", "merged", "nf4", "gguf"))]
    texts = {
        path: path.read_text() for f in folders for path in f.glob("*") if path.suffix in (".md", ".json")
    }
    named = {path.name for path, text in texts.items() if str(tmp_path) in text}
    assert named == {"training.json", "adapter_config.json"}  # where it is needed to load the adapter
    for folder in folders[1:]:
        recipe = json.loads((folder / "export.json").read_text())
        assert recipe["base"] == "base" and recipe["base_fingerprint"].startswith("sha256:")
    assert "`base`" in (folders[0] / "README.md").read_text()


def test_paths_that_a_library_noted_down_are_taken_out(tmp_path):
    work = tmp_path / "exports" / ".gptq"
    noted = {"bits": 4, "meta": {"offload_to_disk_path": f"{work}/quantized/abc", "damp": 0.1}, "x": [1]}
    assert _without_paths(noted, work) == {"bits": 4, "meta": {"damp": 0.1}, "x": [1]}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"),
        ("gpt2", "gpt2"),
        ("builtin:smollm2-135m-instruct", "builtin:smollm2-135m-instruct"),
        ("/home/me/models/SmolLM2/", "SmolLM2"),
        ("../models/SmolLM2", "SmolLM2"),
        ("a/b/SmolLM2", "SmolLM2"),
    ],
)
def test_a_base_is_named_as_its_user_would(given, named):
    assert base_name(given) == named
