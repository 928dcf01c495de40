"""Tokens and positions that the model has no place for end a command in one line, before it loads weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qlora_trainer.__main__ import main
from qlora_trainer.jobs import training as parts
from tests import tiny


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "load_base", lambda *given, **named: pytest.fail("weights are loaded"))


def model(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    """Its embedding has 262 rows, as many as the tiny tokenizer has tokens: one more is beyond."""
    return tiny.save(folder / "model", architecture, vocab_size=262, **changes)


def add(folder: Path, *tokens: str, **special: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def line(folder: Path, *answers: str, command: str = "train") -> list[str]:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": "say", "output": answer}) + "\n" for answer in answers)
    )
    return [
        command,
        "recipe=tiny",
        f"model.model_name_or_path={folder / 'model'}",
        f"data.path={rows}",
        f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
        "train.max_steps=1",
        "train.max_length=512",
    ]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_used_tokens_beyond_the_embedding_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_loading: None, command: str
) -> None:
    add(model(tmp_path), "<tool>", "</tool>")
    arguments = line(tmp_path, "plain", "<tool>x", "<tool>y</tool>", command=command)
    capsys.readouterr()
    assert main(arguments) == 65
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'<tool>' (id 262, 2 times), '</tool>' (id 263, 1 times)" in said and "262 rows" in said
    assert "resize_token_embeddings" in said


def test_unused_tokens_beyond_the_embedding_harm_nobody(tmp_path: Path) -> None:
    add(model(tmp_path), "<tool>", "</tool>")
    assert main(line(tmp_path, "plain", "simple")) == 0


def test_a_pad_token_beyond_the_embedding_gives_way_to_one_within(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(model(tmp_path), pad_token="[PAD]")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == 262
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"instruction": "say" * n, "output": "x"}) + "\n" for n in (1, 9)))
    arguments = [*line(tmp_path, "one", "a much longer answer"), f"data.eval_path={other}"]
    task = ["evaluate.enabled=true", "evaluate.task=exact_match", "evaluate.max_new_tokens=2"]
    assert main([*arguments, *task, "train.per_device_train_batch_size=2"]) == 0  # pads, and generates
    assert "<|im_end|> pads in place of [PAD] (id 262)" in capsys.readouterr().err
    adapter = tmp_path / "run" / "adapter"
    assert AutoTokenizer.from_pretrained(adapter).pad_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(adapter).pad_token_id == 5


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_a_document_longer_than_a_table_of_positions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_loading: None, architecture: str
) -> None:
    tiny.ARCHITECTURES.setdefault("gpt2", dict(tiny.COMMON))
    model(tmp_path, architecture, max_position_embeddings=100)
    for command in ("train", "plan"):
        arguments = line(tmp_path, "short", "long" * 30, command=command)
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "table of 100 positions" in said and "train.max_length=100" in said


@pytest.mark.parametrize("packing", [True, False])
def test_documents_within_a_table_are_trained_on_whatever_max_length_says(
    tmp_path: Path, packing: bool
) -> None:
    model(tmp_path, "opt", max_position_embeddings=99)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"instruction": "say", "output": "y" * 70}) + "\n")
    arguments = line(tmp_path, *["x" * 70] * 20)
    task = ["evaluate.enabled=true", "evaluate.task=exact_match", "evaluate.max_new_tokens=90"]
    task += [f"data.eval_path={other}", f"train.packing={packing}"]
    assert main([*arguments, *task]) == 0  # the answers end where the table does


def test_a_document_longer_than_rotary_positions_were_trained_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(tmp_path, max_position_embeddings=100)
    for answer, noted in (("long" * 30, True), ("short", False)):
        capsys.readouterr()
        assert main([*line(tmp_path, answer), f"output_dir={tmp_path / answer}"]) == 0
        assert ("100 positions (max_position_embeddings)" in capsys.readouterr().err) == noted
