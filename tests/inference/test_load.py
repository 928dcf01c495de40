"""Adapters from elsewhere come onto their base as it was when they learned."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import CheckpointError
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.equality import compare
from qlora_trainer.export.merge import Merge
from qlora_trainer.inference.load import adapter_stops, load, load_base_alone, trained_base
from tests.export import runs

MORE = torch.tensor([[6, 7, 264, 8, 270, 9]])  # of 263 tokens and eight new ones


def logits(model, ids=MORE):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_more_tokens_brings_their_embeddings(tmp_path, saved, tied):
    run = runs.make(tmp_path, method="none", tie_word_embeddings=tied)
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    plain = logits(base, MORE[:, :2])
    base.resize_token_embeddings(271)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model = peft.get_peft_model(base, config).eval()
    runs.stir(model, 0.1)
    shutil.rmtree(run.adapter)
    model.save_pretrained(run.adapter)
    config = run.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(run.base)}))
    trained = logits(model)

    loaded = load(run.adapter).model
    assert torch.allclose(logits(loaded), trained, atol=1e-5)
    alone = load_base_alone(run.adapter).model
    assert torch.allclose(logits(alone, MORE[:, :2])[..., :263], plain, atol=1e-6)
    assert logits(alone).isfinite().all() and logits(alone).shape[-1] == 271

    updates = read_updates(run.adapter)
    merge = Merge.plan(Base(str(run.base), None, Held("none", False, torch.float32), runs.CPU), updates)
    (tmp_path / "merged").mkdir()
    merge.write(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merge.vocab_size == merged.config.vocab_size == 271
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    found = compare(loaded, tmp_path / "merged")
    assert (found.unequal, found.strays) == ([], [])


def test_a_revision_is_kept_where_the_base_is_named_as_the_adapter_names_it(tmp_path):
    run = runs.make(tmp_path)
    config = run.adapter / "adapter_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"base_model_name_or_path": "owner/model", "revision": "abc"}
        )
    )
    (run.adapter / "training.json").unlink()
    assert trained_base(run.adapter).revision == "abc"
    assert trained_base(run.adapter, "owner/model").revision == "abc"
    assert trained_base(run.adapter, str(run.base)).revision is None


def test_an_adapter_without_safetensors_is_said_wherever_it_is_read(tmp_path):
    run = runs.make(tmp_path)
    (run.adapter / "adapter_model.safetensors").rename(run.adapter / "adapter_model.bin")
    for read in (read_updates, load):
        with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors in it, and no pickle"):
            read(run.adapter)


def test_an_adapter_that_says_nothing_of_ends_stops_where_its_base_does(tmp_path):
    run = runs.make(tmp_path)
    (run.adapter / "generation_config.json").unlink()
    defaults = run.base / "generation_config.json"
    defaults.write_text(json.dumps({"eos_token_id": [2, 9], "temperature": 0.7}))
    assert adapter_stops(run.adapter, run.tokenizer, str(run.base), None) == [2, 5, 9]
    assert load(run.adapter).stop_ids == [2, 5, 9] == load_base_alone(run.adapter).stop_ids
    defaults.unlink()
    config = run.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 7}))
    assert load(run.adapter).stop_ids == [5, 7]
