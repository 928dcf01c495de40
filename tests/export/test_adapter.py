import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from qlora_trainer.config.schema import ExportConfig, RunConfig
from qlora_trainer.errors import CheckpointError, MissingInputError
from qlora_trainer.export.adapter import TrainedOn, export_adapter
from qlora_trainer.inference.chat import Chat, ChatOptions
from qlora_trainer.inference.generate import Sampling, generate
from qlora_trainer.inference.load import load, trained_base
from qlora_trainer.jobs.verification import subject
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from tests import tiny
from tests.export import runs
from tests.inference.test_stop import plainly_ended, taught_last

PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
FOLDER, prompt = sys.argv[1], json.loads(sys.argv[2])
{loading}
ids = torch.tensor([prompt])
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
print(json.dumps([out[0, len(prompt):].tolist(), tokenizer.chat_template, "qlora_trainer" in sys.modules]))
"""


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_adapter_gives_the_same_text_in_a_fresh_process_without_us(tmp_path, method):
    run = runs.make(tmp_path, method=method)
    prompt = run.tokenizer("hello there")["input_ids"]
    (expected,) = generate(run.model, [prompt], [], 0, Sampling(max_new_tokens=24))
    with run.model.disable_adapter():
        (base,) = generate(run.model, [prompt], [], 0, Sampling(max_new_tokens=24))
    assert expected != base
    card = (run.adapter / "README.md").read_text()
    loading = card.partition("```python\n")[2].partition("```")[0]  # what the card says is what is tried
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN.format(loading=loading), str(run.adapter), json.dumps(prompt)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ids, template, ours = json.loads(done.stdout.splitlines()[-1])
    stops = [run.tokenizer.eos_token_id]
    cut = next((i for i, token in enumerate(expected) if token in stops), len(expected))
    assert ids[:cut] == expected[:cut] and cut > 8
    assert template == tiny.CHATML and not ours


def test_loading_it_back_gives_the_same_logits_bit_for_bit(tmp_path):
    run = runs.make(tmp_path, lora=LoraOptions(r=4, use_rslora=True, modules_to_save=["lm_head"]))
    ids = torch.arange(6, 40)[None]
    loaded = load(run.adapter.parent)
    assert torch.equal(loaded.model(ids).logits, run.model(ids).logits)
    assert loaded.stop_ids == [run.tokenizer.eos_token_id]
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


def test_the_folder_names_its_base_and_how_it_was_held(tmp_path):
    run = runs.make(tmp_path)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    trained = json.loads((run.adapter / "training.json").read_text())
    assert config["base_model_name_or_path"] == str(run.base) and config["inference_mode"]
    # a set's order is the process's own: another one must write the same bytes
    assert len(config["target_modules"]) > 4 and config["target_modules"] == sorted(config["target_modules"])
    assert trained["method"] == "nf4" and trained["double_quant"] and trained["dtype"] == "float32"
    assert trained["base_fingerprint"].startswith("sha256:")
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert os.stat(run.adapter / "adapter_model.safetensors").st_mode & 0o777 == 0o644 & ~umask()


def test_a_token_that_is_not_special_ends_answers_everywhere_if_turns_end_with_it(tmp_path):
    """In the adapter's folder, in evaluation and chat, in verify and for every export that is made of it."""
    run, tokenizer = runs.make(tmp_path), plainly_ended()
    done, eos = tokenizer.convert_tokens_to_ids(["<|done|>", "</s>"])
    options = TrainedOn.with_options(run.options, runs.CPU)
    adapter = export_adapter(run.model, tokenizer, tmp_path / "other" / "adapter", options)
    stops = sorted({done, eos, run.model.get_base_model().generation_config.eos_token_id})
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == stops
    loaded = load(adapter)
    assert loaded.stop_ids == stops and set(taught_last(loaded.tokenizer)) == {done}
    assert Chat(loaded, ChatOptions(Sampling()), print).config.eos_token_id == stops
    assert subject(RunConfig(export=ExportConfig(adapter=str(adapter)))).stop_ids == stops


def test_a_failed_export_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    run = runs.make(tmp_path)
    before = sorted(path.name for path in run.adapter.parent.iterdir())

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_trainer.export.adapter.write_json", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        export_adapter(run.model, run.tokenizer, run.adapter, TrainedOn.with_options(run.options, runs.CPU))
    assert sorted(path.name for path in run.adapter.parent.iterdir()) == before
    load(run.adapter)


def test_an_adapter_of_another_base_is_refused_with_the_shapes(tmp_path):
    run = runs.make(tmp_path / "one")
    other = tiny.save(tmp_path / "other", intermediate_size=192)
    with pytest.raises(CheckpointError, match=rf"fingerprint .* {other} has sha256"):
        load(run.adapter, base=str(other))
    (run.adapter / "training.json").unlink()  # as an adapter of somebody else's has none
    with pytest.raises(CheckpointError, match=r"another base.*size mismatch.*128, 4.*192, 4"):
        load(run.adapter, base=str(other))


def test_a_base_of_a_relative_path_is_named_by_its_absolute_one(tmp_path, monkeypatch):
    base = tiny.save(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    options = BaseOptions("base")
    model = attach(load_base(options, runs.CPU), LoraOptions(r=4), seed=1)
    adapter = export_adapter(
        model, tiny.tokenizer(), tmp_path / "adapter", TrainedOn.with_options(options, runs.CPU)
    )
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    AutoPeftModelForCausalLM.from_pretrained(adapter)
    load(adapter)


def test_the_revision_of_a_base_is_that_of_training_unless_another_base_is_named(tmp_path):
    run = runs.make(tmp_path)
    for file, changes in (
        ("adapter_config.json", {"base_model_name_or_path": "owner/base", "revision": "abc"}),
        ("training.json", {"model_name_or_path": "owner/base", "source": "owner/base", "revision": "abc"}),
    ):
        path = run.adapter / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert trained_base(run.adapter).revision == "abc"
    assert trained_base(run.adapter, "owner/base").revision == "abc"
    assert trained_base(run.adapter, "owner/copy").revision is None
    assert trained_base(run.adapter, "owner/copy", revision="def").revision == "def"


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(MissingInputError, match="training command again"):
        load(tmp_path / "run")
    with pytest.raises(MissingInputError, match="neither"):
        load(tmp_path)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
