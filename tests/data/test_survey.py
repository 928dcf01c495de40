"""What `inspect` shows is what the loader gives: numbers counted again by hand, tokens that join to text."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_trainer.data import DataOptions, Loader, TokenizedData
from qlora_trainer.data.page import write_page
from qlora_trainer.data.screen import show
from qlora_trainer.data.survey import Survey, survey, tokens_of
from tests.data.conftest import ROWS, write_jsonl
from tests.data.families import FAMILIES, tokenizer

EVIL = "</script><img src=x onerror=alert(1)> 안녕 🙂"


@pytest.fixture
def make(load: Callable[..., TokenizedData], tmp_path: Path) -> Callable[..., tuple[Survey, Loader]]:
    rows = [*ROWS, {"instruction": EVIL, "output": EVIL}, {"instruction": "x", "output": ""}]

    def made(role: str = "train", packing: bool = True, **options: Any) -> tuple[Survey, Loader]:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        data = load(path, role=role, **options)
        loader = Loader(
            data,
            micro_batch_size=2,
            accumulation=2,
            max_length=128,
            packing=packing,
            group_by_length=False,
            seed=3,
            pad_id=0,
        )
        given = DataOptions(path=str(path), **options)
        return survey(data, loader, given, tokenizer("qwen3"), role=role, seed=0), loader

    return made


@pytest.mark.parametrize("packing", [True, False])
def test_numbers_are_those_of_the_batches(make: Callable[..., tuple[Survey, Loader]], packing: bool) -> None:
    found, loader = make(packing=packing)
    batches = [batch for step in loader.steps(0) for batch in step.micro_batches]
    assert found.steps == loader.steps_per_epoch(0)
    assert found.rows == sum(len(batch.input_ids) for batch in batches)
    assert found.supervised == sum(batch.n_supervised for batch in batches)
    assert found.tokens == sum(batch.n_tokens for batch in batches)
    assert found.padding == pytest.approx(
        1 - found.tokens / sum(batch.input_ids.numel() for batch in batches)
    )
    assert sum(count for _, _, count in found.histogram) == found.documents == len(loader.data)
    assert (found.ledger.read, found.ledger.kept, found.ledger.dropped) == (62, 61, {"empty_answer": 1})
    assert found.prompts.compared == found.prompts.same == 61 and found.prompts.difference is None


def test_the_shown_batch_is_the_collated_one(make: Callable[..., tuple[Survey, Loader]]) -> None:
    found, loader = make()
    rows = [(batch, row) for batch in loader.step(0, 0).micro_batches for row in range(len(batch.input_ids))]
    assert len(found.batch) == len(rows) == found.batch_total
    for shown, (batch, row) in zip(found.batch, rows, strict=True):
        tokens = [token for document in shown.documents for token in document.tokens]
        assert [token.id for token in tokens] == batch.input_ids[row, : len(tokens)].tolist()
        assert [token.position for token in tokens] == batch.position_ids[row, : len(tokens)].tolist()
        assert [token.weight for token in tokens] == batch.loss_weights[row, : len(tokens)].tolist()
        assert len(tokens) + shown.padding == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_token_texts_join_to_the_text(family: str) -> None:
    tok = tokenizer(family)
    text = "two  plus 안녕하세요 🙂 é ok"
    ids = tok("." + text, add_special_tokens=False)["input_ids"]
    tokens = tokens_of(ids, list(range(len(ids))), [0.0] * len(ids), tok)
    assert "".join(token.text for token in tokens).lstrip(" .") == text


def test_page_embeds_the_survey_and_nothing_from_outside(
    make: Callable[..., tuple[Survey, Loader]], tmp_path: Path
) -> None:
    surveys = {role: make(role, eval_fraction=0.3)[0] for role in ("train", "eval")}
    page = tmp_path / "deep" / "inspect.html"
    write_page(surveys, "a </title> recipe", page)
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=|https?:|@import|url\(""", html.replace("<img src=x", ""))
    assert "default-src 'none'" in html and "<img src=x" not in html and "</title> recipe" not in html
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert embedded is not None
    data = json.loads(embedded[1])
    assert set(data["roles"]) == {"train", "eval"}
    assert data["roles"]["train"]["ledger"] + data["roles"]["eval"]["ledger"] == [
        [f"{tmp_path / 'rows.jsonl'}:62", "empty_answer", "no answer text to learn"]
    ]
    texts = [
        "".join(token[0] for token in document["tokens"])
        for role in data["roles"].values()
        for row in role["rows"]
        for document in row["documents"]
    ]
    assert len(texts) > 5 and all(text.startswith("<|im_start|>user") for text in texts)
    assert not list(page.parent.glob("*.tmp"))


def test_screen_tells_the_numbers_and_warns(make: Callable[..., tuple[Survey, Loader]]) -> None:
    found, _ = make(packing=False)
    text = io.StringIO()
    ledger = replace(found.ledger, remarks=["data: test.jsonl not read: data.split=train"])
    held = replace(found, shared=3)
    show({"train": replace(found, padding=0.31, ledger=ledger), "eval": held}, Console(file=text, width=300))
    assert "! data: test.jsonl not read: data.split=train" in text.getvalue()
    assert "! held out: 3 of 61 held-out documents are training documents too" in text.getvalue()
    assert "62 read, 61 kept, 1 dropped" in text.getvalue()
    assert "the same prompt ids as in training, in 61 of 61 compared" in text.getvalue()
    assert re.search(r"! 31% of positions are padding; train.packing=true", text.getvalue())


def test_a_template_that_prompts_otherwise_at_inference_is_shown(
    load: Callable[..., TokenizedData], tmp_path: Path
) -> None:
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data = load(path, template=str(template))
    loader = Loader(
        data,
        micro_batch_size=2,
        accumulation=2,
        max_length=128,
        packing=True,
        group_by_length=False,
        seed=3,
        pad_id=0,
    )
    found = survey(
        data,
        loader,
        DataOptions(path=str(path), template=str(template)),
        tokenizer("qwen3"),
        role="train",
        seed=0,
    )
    assert found.prompts.same == 0 and found.prompts.compared == 60
    assert found.ledger.notes["prompt_differs"] == 60
    text = io.StringIO()
    show({"train": found}, Console(file=text, width=400))
    assert "60 rows have a prompt that the template renders otherwise at inference" in text.getvalue()
    assert "rows.jsonl:1: from token" in text.getvalue() and "inference ['<" in text.getvalue()


def test_inspect_command_prints_and_writes_its_page(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_trainer.__main__ import main
    from tests import tiny

    monkeypatch.chdir(tmp_path)
    model = tiny.save(tmp_path / "model")
    line = [
        f"model.model_name_or_path={model}",
        f"data.path={rows_file}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    assert main(["inspect", *line, "output_dir=out", "train.packing=true", "train.max_length=256"]) == 0
    assert "60 read, 60 kept, 0 dropped" in capsys.readouterr().out
    assert (tmp_path / "out" / "inspect.html").stat().st_size > 10_000
    assert main(["inspect", *line[:2], "data.path=nothing.json"]) == 66
    rows_file.write_text('{"instruction": 1, "output": "a"}\n')
    assert main(["inspect", *line]) == 65
    assert "rows.jsonl:1: instruction: expected text, found a number" in capsys.readouterr().err
