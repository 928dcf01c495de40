"""What a GGUF file says beside its weights: how text becomes tokens, where answers end, what it lacks."""

import copy
import json
from dataclasses import replace

import gguf
import pytest
from tokenizers import processors
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import ConfigError
from qlora_trainer.export.formats import Exporter
from qlora_trainer.export.gguf import _PRE
from qlora_trainer.export.reader import SPLITS, GgufReader, reader_of
from qlora_trainer.export.source import ExportOptions, Rows
from tests import tiny
from tests.export import runs
from tests.export.test_verify import source

TEXT = "  Two spaces, 1234 digits\n\n and äöü — it's 12+34?<|im_end|>\n"
CHAT = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("gguf"))


def with_bos(tokenizer):
    """One that puts <s> before every text, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def made(run, folder, **changes):
    what = replace(source(run), **changes)
    return Exporter(what, ExportOptions(gguf_type="f16"), folder / "tuned" / "exports", runs.CPU, list)


def test_the_file_is_called_as_the_run_and_not_as_its_base(run, tmp_path):
    fields = GgufReader(next(made(run, tmp_path).export("gguf").glob("*.gguf"))).fields
    assert fields["general.name"].contents() == "tuned"
    assert fields["general.base_model.0.name"].contents() == "base"


@pytest.mark.parametrize("share", [None, 1.0, 0.0])
def test_text_becomes_the_ids_of_training_bos_included(run, tmp_path, share):
    tokenizer = with_bos(run.tokenizer)
    folder = made(run, tmp_path, tokenizer=tokenizer, rows=Rows(40, share)).export("gguf")
    reader = reader_of(folder)
    assert reader.adds_bos == (share != 0.0)
    trained = tokenizer.encode(TEXT, add_special_tokens=share != 0.0)
    assert reader.encode(TEXT, prefixed=True) == trained
    assert (trained[0] == tokenizer.bos_token_id) == (share != 0.0)


def test_a_template_that_writes_bos_gives_one_and_not_two(run, tmp_path):
    tokenizer = with_bos(run.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tiny.CHATML
    reader = reader_of(made(run, tmp_path, tokenizer=tokenizer).export("gguf"))
    ids = reader.prompt(CHAT)
    assert ids[:2] == [1, 4] and ids == tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )


def test_a_tokenizer_without_bos_gets_none(run, tmp_path):
    reader = reader_of(made(run, tmp_path).export("gguf"))
    assert not reader.adds_bos and reader.encode(TEXT, prefixed=True) == run.tokenizer.encode(TEXT)


def test_the_end_of_turn_is_named_beside_the_end_of_sequence(run, tmp_path):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.eos_token = "</s>"
    folder = made(run, tmp_path, tokenizer=tokenizer, stop_ids=[2, 4, 5]).export("gguf")
    reader = reader_of(folder)
    named = {kind: reader.fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")}
    assert named == {"eos": 2, "eot": 4}  # 5 is <|im_end|>, which llama.cpp knows
    assert set(reader.stops()) >= {2, 4, 5}


def test_tokens_without_a_row_in_the_embedding_are_left_out_and_told(run, tmp_path):
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)  # 262, and 263 of 263 rows
    tokenizer.pad_token = "</tool>"
    exports = made(run, tmp_path, tokenizer=tokenizer)
    exports.check(["gguf"])
    (limit,) = exports.limits("gguf")
    assert "263 rows and none for </tool>" in limit
    folder = exports.export("gguf")
    assert limit in (folder / "README.md").read_text()
    tokens = reader_of(folder).fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 263 and tokens[262] == "<tool>"
    assert "tokenizer.ggml.padding_token_id" not in reader_of(folder).fields


def test_rows_of_two_kinds_are_told(run, tmp_path):
    exports = made(run, tmp_path, tokenizer=with_bos(run.tokenizer), rows=Rows(40, 0.25))
    (limit,) = exports.limits("gguf")
    assert "25% of the training rows begin with <s>" in limit and "is not added" in limit
    assert made(run, tmp_path, rows=Rows(40, 0.25)).limits("gguf") == []  # no rule to write


def test_a_sliding_window_is_refused_where_training_saw_past_it(tmp_path):
    run = runs.make(tmp_path, "mistral", sliding_window=32)
    with pytest.raises(ConfigError, match=r"the last 32 tokens.* up to 33 tokens"):
        made(run, tmp_path, rows=Rows(33)).check(["gguf"])
    exports = made(run, tmp_path, rows=Rows(32))
    exports.check(["gguf"])
    assert "the last 32 tokens" in exports.limits("gguf")[0]
    fields = reader_of(exports.export("gguf")).fields
    assert fields["llama.context_length"].contents() == 32
    whole = runs.make(tmp_path / "whole", "mistral")
    assert made(whole, tmp_path / "whole", rows=Rows(250)).limits("gguf") == []


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 1234  x", ["it", "'s", "Ġ1234", "Ġ", "Ġx"]),
        ("smollm", "it's 1234  x", ["it", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx"]),
        ("llama-bpe", "IT'S 1234\n\nx", ["IT", "'S", "Ġ", "123", "4", "ĊĊ", "x"]),
        ("qwen2", "IT'S 12\n\nx", ["IT", "'S", "Ġ", "1", "2", "ĊĊ", "x"]),
    ],
)
def test_splits_are_llama_cpp_s(tmp_path, name, text, pieces):
    assert {known for known, _ in _PRE} == set(SPLITS)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(["a", "aa"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 2)
    writer.add_token_merges(["a a"])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    run_tokenizer = tiny.tokenizer()
    run_tokenizer.save_pretrained(tmp_path)
    reader = GgufReader(tmp_path / "vocabulary.gguf")
    assert [piece for piece, _ in reader._bpe.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_sampling_values_without_do_sample_stay_as_the_base_has_them(tmp_path):
    run = runs.make(tmp_path)
    path = run.base / "generation_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    stored |= {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "_from_model_config": True}
    path.write_text(json.dumps(stored))
    folder = made(run, tmp_path, stop_ids=[2, 5]).export("merged")
    found = json.loads((folder / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"], found["eos_token_id"]) == (0.9, 0.6, [2, 5])
    assert "do_sample" not in found and "_from_model_config" not in found
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [2, 5]
