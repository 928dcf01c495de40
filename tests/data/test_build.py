"""From a path to documents: what is refused, what is cached, what is held out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_trainer.data import DataOptions, TokenizedData, build, load_tokenized, tokenizer_fingerprint
from qlora_trainer.data.rows import Row
from qlora_trainer.data.screen import worries
from qlora_trainer.errors import ConfigError, DataError, MissingInputError
from qlora_trainer.system import cache
from tests.damage import DAMAGE, Damage, deleted
from tests.data.conftest import ROWS, write_jsonl
from tests.data.families import tokenizer

Load = Callable[..., TokenizedData]
GOOD = {"instruction": "hi", "output": "hello"}


def dump(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD: dict[str, tuple[str, bytes, str]] = {  # name -> file, content, message
    "broken JSON line": ("a.jsonl", dump(GOOD) + b'{"instruction": \n', r":2: broken JSON"),
    "wrong type": (
        "a.jsonl",
        dump(GOOD, {**GOOD, "output": 3}),
        r":2: output: expected text, found a number",
    ),
    "missing column": ("a.jsonl", dump(GOOD, {"instruction": "a"}), r":2: output: missing column"),
    "no known columns": (
        "a.jsonl",
        dump({"Q": "a", "A": "b"}),
        r":1: no known format has the columns Q, A",
    ),
    "empty file": ("a.jsonl", b"", "empty: no rows"),
    "empty array": ("a.json", b"[]", "empty: no rows"),
    "header only": ("a.csv", b"instruction,output\n", "empty: no rows"),
    "non-UTF-8": (
        "a.jsonl",
        dump(GOOD) + b'{"instruction": "caf\xe9", "output": "a"}\n',
        r":2: not UTF-8",
    ),
    "NUL byte": ("a.jsonl", dump(GOOD) + b'{"instruction": "a\0", "output": "a"}\n', r":2: NUL byte"),
    "escaped NUL": ("a.jsonl", dump(GOOD, {**GOOD, "output": "a\0"}), r":2: output: NUL"),
    "row over 10 MB": (
        "a.jsonl",
        dump(GOOD, {**GOOD, "output": "a" * (11 << 20)}),
        r":2: longer than 10 MiB",
    ),
    "unknown role": (
        "a.jsonl",
        dump({"messages": [{"role": "robot", "content": ""}]}),
        r":1: messages\[0\]\.role: unknown",
    ),
    "not alternating": (
        "a.jsonl",
        dump({"messages": [{"role": "user", "content": "a"}] * 2}),
        r":1: messages\[1\]: user turn after user",
    ),
    "duplicate ids": (
        "a.jsonl",
        dump({**GOOD, "id": 7}, GOOD, {**GOOD, "id": 7}),
        r":3: id: the same as in .*a\.jsonl:1",
    ),
    "empty conversation": ("a.jsonl", dump({"messages": []}), r":1: messages: empty conversation"),
    "preference pairs": (
        "a.jsonl",
        dump({"prompt": "a", "chosen": "b", "rejected": "c"}),
        r":1: preference data",
    ),
    "unknown kind": ("a.docx", b"x", r"a\.docx: unknown kind of file"),
    "nothing to learn": (
        "a.jsonl",
        dump({**GOOD, "output": ""}),
        "none of 1 rows can be trained on .1 empty_answer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_with_file_line_and_field(load: Load, tmp_path: Path, name: str) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / file)
    assert caught.value.exit_code == 65
    left = [path for path in tmp_path.glob("cache/*") if path.suffix != ".lock" and path.name != "scans"]
    assert not left, "nothing of a failed build stays"


def test_all_bad_rows_are_counted_and_the_first_five_named(load: Load, tmp_path: Path) -> None:
    rows = [GOOD if n % 2 else {"instruction": n, "output": "a"} for n in range(20)]
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "a.jsonl", rows))
    first, *named = str(caught.value).splitlines()
    assert first.startswith("10 of 20 rows are bad") and "data.on_bad_row=skip" in first
    assert [line.split(":")[1] for line in named] == ["1", "3", "5", "7", "9"]


def test_skip_leaves_bad_rows_out_and_the_ledger_says_which(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        dump({**GOOD, "id": 1}, {**GOOD, "output": 3})
        + b"{broken\n"
        + dump({**GOOD, "id": 1}, {**GOOD, "output": " "}, GOOD)
    )
    data = load(path, on_bad_row="skip")
    assert (data.ledger.read, data.ledger.kept, len(data)) == (6, 2, 2)
    assert data.ledger.dropped == {"bad_row": 2, "duplicate_id": 1, "empty_answer": 1}
    assert [(row.where.rsplit(":")[-1], row.reason) for row in data.ledger.rows()] == [
        ("2", "bad_row"),
        ("3", "bad_row"),
        ("4", "duplicate_id"),
        ("5", "empty_answer"),
    ]
    assert [data.where(index).rsplit(":")[-1] for index in range(2)] == ["1", "6"]


def test_missing_and_misleading_paths(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingInputError, match=r"none\.jsonl: no such file") as caught:
        load(tmp_path / "none.jsonl")
    assert caught.value.exit_code == 66
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        load(tmp_path / "folder.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without"):
        load(tmp_path / "empty")
    with pytest.raises(MissingInputError, match="no such built-in data"):
        load("builtin:nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(MissingInputError, match="the hub cannot be reached"):
        load("nobody/no-such-dataset-anywhere")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "truncate"}, "did you mean truncate_"),
        ({"format": "alpacca"}, "did you mean alpaca"),
        ({"on_bad_row": "ignore"}, "expected one of error skip"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"eval_fraction": 0.1, "eval_path": "b"}, "both set"),
        ({"train_on_inputs": True, "train_on_last_turn_only": True}, "contradict"),
        ({"max_rows": 0}, "at least 1"),
        ({"num_workers": -1}, "0 or more"),
        ({"path": None}, "data.path is not set"),
        ({"path": []}, "data.path is not set"),
        ({"path": [{"pth": "a"}]}, "expected a text or a mapping"),
        ({"path": [{"path": "a", "wieght": 2}]}, "did you mean weight"),
        ({"path": [{"path": "a", "weight": 0}]}, "above 0"),
    ],
)
def test_wrong_options_are_refused_before_a_file_is_opened(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataOptions(**({"path": "a"} | options))


def test_a_folder_is_all_its_files_in_order(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", ROWS[:3])
    (folder / "a.json").write_text(json.dumps(ROWS[3:5]))
    write_jsonl(folder / "sub" / "c.jsonl", ROWS[5:6])
    (folder / "README").write_text("not data")
    data = load(folder)
    assert [data.where(at).removeprefix(f"{folder}/") for at in range(6)] == [
        "a.json:1[0]",
        "a.json:1[1]",
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
        "sub/c.jsonl:1",
    ]


def test_a_folder_of_splits_is_read_by_its_split_and_says_what_is_not(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:9])
    data = load(folder)
    assert len(data) == 9 and data.ledger.remarks == []
    write_jsonl(folder / "test.jsonl", ROWS[9:12])
    (folder / "README.md").write_text("# About")
    again = load(folder)
    assert again.folder == data.folder, "what is not read changes nothing"
    assert [line.removeprefix(f"{folder}: ") for line in again.ledger.remarks] == [
        "test.jsonl not read: data.split=train",
        "README.md not read: text beside data; to read it, name it as data.path",
    ]
    assert len(load(folder, split="test")) == len(load(folder, eval_path=str(folder), role="eval")) == 3
    (folder / "both.json").write_text(json.dumps({"dev": ROWS[:2], "train": ROWS[2:7]}))
    for _ in range(2):  # built, and from the cache
        both = load(folder / "both.json")
        assert len(both) == 5
        assert both.ledger.remarks == [f"{folder / 'both.json'}: dev (2 rows) not read: data.split=train"]


def test_turns_of_an_agent_in_a_row_are_taught_where_the_template_renders_them(
    load: Load, tmp_path: Path
) -> None:
    said = [
        ("user", "go"),
        ("assistant", "one"),
        ("assistant", "two"),
        ("user", "on"),
        ("assistant", "three"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    document = load(path, template="chatml").document(0)
    taught = tokenizer("qwen3").decode(document.ids[document.weights > 0])
    assert taught == "one<|im_end|>two<|im_end|>three<|im_end|>"
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages: .*roles must alternate"):
        load(path, template=str(tmp_path / "strict.jinja"))


TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools|tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function|tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_parquet_and_lines_of_the_same_rows_are_the_same_tokens(load: Load, tmp_path: Path) -> None:
    """Arrow gives each object the keys of all: `weather` would be called with the arguments of `add`."""

    def row(number: int) -> dict[str, Any]:
        name, arguments = [("weather", {"town": f"Ulm {number}"}), ("add", {"a": number, "b": 2})][number % 2]
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": type(value).__name__} for key, value in arguments.items()}
        schema = {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": properties},
        }
        return {
            "messages": [
                {"role": "user", "content": "Do it."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "ok"},
                {"role": "assistant", "content": f"Done {number}."},
            ],
            "tools": [{"type": "function", "function": schema}],
        }

    rows = [row(number) for number in range(12)]
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "t.jinja").write_text(TOOLS)
    for options in ({}, {"eval_fraction": 0.5, "role": "eval"}):
        first, second = (
            load(path, template=str(tmp_path / "t.jinja"), max_length=400, **options)
            for path in (lines, tmp_path / "rows.parquet")
        )
        assert first.fingerprint == second.fingerprint
    text = tokenizer("qwen3").decode(
        load(lines, template=str(tmp_path / "t.jinja"), max_length=400).document(0).ids
    )
    assert '<call>{"name": "weather", "arguments": {"town": "Ulm 0"}}</call>' in text


def test_sources_mix_formats_and_are_capped_one_by_one(load: Load, rows_file: Path, tmp_path: Path) -> None:
    chat = write_jsonl(
        tmp_path / "chat.jsonl",
        [
            {"conversations": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": "hello"}]}
            for n in range(9)
        ],
    )
    data = load([{"path": str(rows_file), "max_rows": 4}, {"path": str(chat), "weight": 3}])
    assert data.formats == ["alpaca", "sharegpt"] and len(data) == 13
    assert data.repeats.tolist() == [1.0] * 4 + [3.0] * 9


def test_held_out_fraction_parts_the_rows(load: Load, rows_file: Path) -> None:
    whole, train, held = (
        load(rows_file, **options)
        for options in ({}, {"eval_fraction": 0.3}, {"eval_fraction": 0.3, "role": "eval"})
    )

    def ids(data: TokenizedData) -> set[tuple[int, ...]]:
        return {tuple(data.document(at).ids.tolist()) for at in range(len(data))}

    assert ids(train) | ids(held) == ids(whole) and not ids(train) & ids(held)
    assert 8 <= len(held) <= 30
    assert ids(load(rows_file, eval_fraction=0.3, role="eval", seed=1)) != ids(held)


def test_held_out_file_is_read_instead(load: Load, rows_file: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "held.jsonl", ROWS[:7])
    assert len(load(rows_file, eval_path=str(other), role="eval")) == 7
    assert len(load(rows_file, eval_path=str(other))) == 60


def test_prompts_are_those_of_training_with_the_answer_apart(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, {"instruction": "bye", "output": "so long " * 100}])
    data = load(path, max_length=64)
    [prompt] = data.prompts(tokenizer("qwen3"))  # a cut answer is no reference
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.reference == "<think>\n\n</think>\n\nhello"
    assert prompt.where == f"{path}:1"
    assert list(data.prompts(tokenizer("qwen3"), limit=0)) == []


def test_a_template_for_rows_without_turns_is_a_contradiction(load: Load, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ConfigError, match=r"holds no conversations.*data\.columns=\{instruction: prompt"):
        load(path, template="chatml")
    mapped = load(path, template="chatml", columns={"instruction": "prompt", "output": "completion"})
    assert mapped.formats == ["alpaca"] and mapped.template_origin == "named chatml"


def test_plain_text_asks_nothing(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo three\n")
    data = load(tmp_path / "a.txt")
    assert len(data) == 2 and list(data.prompts(tokenizer("qwen3"))) == [] and data.chat_template is None


def test_datasets_of_the_hub_are_asked_for_as_configured(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from qlora_trainer.data import sources

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options["split"], options["revision"]))
        if options["split"] == "trian":
            raise ValueError("Unknown split \"trian\". Should be one of ['train'].\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    data = load("some/data", name="part", revision="abc", max_rows=7)
    assert len(data) == 7 and data.where(6) == "some/data:train:7"
    assert asked[0] == ("some/data", "part", "train", "abc")
    assert load("some/data", name="part", revision="abc", max_rows=7).folder == data.folder
    with pytest.raises(ConfigError, match=r'some/data: Unknown split "trian"[^\n]*$'):
        load("some/data", split="trian")


def test_builtin_restaurant_has_its_three_splits(load: Load) -> None:
    train = load("builtin:restaurant", max_length=512)
    held = load("builtin:restaurant", eval_path="builtin:restaurant/eval_names", role="eval", max_length=512)
    assert len(train) == 800 and 0 < len(held) < 800


# --- the cache


def entries(tmp_path: Path) -> list[str]:
    return sorted(
        path.name
        for path in (tmp_path / "cache").iterdir()
        if not path.name.startswith(".") and path.name != "scans"
    )


def test_a_second_start_reads_the_cache_and_opens_no_row(
    load: Load, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(rows_file)
    monkeypatch.setattr(build, "SourceReader", None)
    monkeypatch.setattr(build, "scan", None)
    second = load(rows_file)
    assert second.fingerprint == first.fingerprint and second.folder == first.folder


def test_whatever_changes_the_tokens_changes_the_key(load: Load, rows_file: Path, tmp_path: Path) -> None:
    load(rows_file)
    for number, changes in enumerate(
        (
            {"max_length": 64},
            {"train_on_inputs": True},
            {"train_on_last_turn_only": True},
            {"template": "chatml"},
            {"overlong": "drop"},
            {"max_rows": 10},
            {"format": "alpaca"},
            {"eval_fraction": 0.2},
            {"eval_fraction": 0.2, "seed": 1},
            {"eval_fraction": 0.2, "role": "eval"},
        ),
        2,
    ):
        load(rows_file, **changes)
        assert len(entries(tmp_path)) == number, changes
    stamp = os.stat(rows_file)
    rows_file.write_bytes(rows_file.read_bytes().replace(b"well", b"fine"))
    os.utime(rows_file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same name, size and time, other content
    before = load(rows_file, max_length=127)
    assert len(entries(tmp_path)) == 12
    shutil.copy(rows_file, tmp_path / "template.jinja")
    assert "fine" in tokenizer("qwen3").decode(before.document(0).ids.tolist())


def test_tokenizer_fingerprint_sees_template_special_tokens_and_vocabulary() -> None:
    fresh = tokenizer.__wrapped__
    prints = {tokenizer_fingerprint(fresh("qwen3"))}
    for change in (
        lambda tok: setattr(tok, "chat_template", tok.chat_template + " "),
        lambda tok: setattr(tok, "pad_token", "<|im_end|>"),
        lambda tok: tok.add_tokens(["newword"]),
        lambda tok: tok.add_special_tokens({"bos_token": "<s>"}),
    ):
        tok = fresh("qwen3")
        change(tok)
        prints.add(tokenizer_fingerprint(tok))
    assert len(prints) == 5
    tok = fresh("qwen3")
    tok(["a", "b b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tok) in prints, "a call with padding changes nothing"


def test_a_file_edited_during_the_build_is_refused(
    load: Load, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build._write

    def edited(*given: Any, **named: Any) -> int:
        kept = original(*given, **named)
        with rows_file.open("a") as stream:
            stream.write(json.dumps(GOOD) + "\n")
        return kept

    monkeypatch.setattr(build, "_write", edited)
    with pytest.raises(DataError, match="changed while it was read"):
        load(rows_file)


def _build_at_once(path: str, cache: str, start: Any, results: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    start.wait()
    data = load_tokenized(DataOptions(path=path), tokenizer("qwen3"), max_length=128, cache_dir=cache)
    results.put((data.fingerprint, int(np.sum(data.document(len(data) - 1).ids))))


def test_processes_that_build_at_once_get_the_same_whole_data(rows_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=_build_at_once, args=(str(rows_file), str(tmp_path / "cache"), start, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    start.set()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1 and len(entries(tmp_path)) == 1
    assert not list((tmp_path / "cache").glob(".building-*"))


@pytest.mark.parametrize(
    "file", ["tokens.i4", "weights.f4", "documents.bin", "ledger.jsonl", "manifest.json"]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_made_anew_and_are_what_they_were(
    load: Load, rows_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch, file: str, damage: Damage
) -> None:
    rows_file.write_bytes(rows_file.read_bytes() + dump({**GOOD, "output": 5}))
    folder = load(rows_file, on_bad_row="skip").folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 5 and all(whole.values())
    monkeypatch.setattr(cache, "_checked", set())  # as in another process
    damage(folder / file)
    capsys.readouterr()
    assert load(rows_file, on_bad_row="skip").folder == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / file) in line and "tokenized again" in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_scan_is_made_anew(
    load: Load, rows_file: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    folder = load(rows_file).folder
    (scan,) = folder.parent.glob("scans/*.json")
    whole = scan.read_bytes()
    damage(scan)
    shutil.rmtree(folder)  # the scan is read when something is tokenized
    capsys.readouterr()
    load(rows_file)
    assert scan.read_bytes() == whole
    assert capsys.readouterr().err.count("checked again") == (damage is not deleted)


def test_many_rows_are_encoded_by_processes_with_the_same_result(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        dump(*(ROWS * 20), {**GOOD, "output": 5}, {**GOOD, "output": ""}, {**GOOD, "output": "so " * 99})
    )
    alone = load(path, on_bad_row="skip")
    monkeypatch.setattr(build, "MANY_ROWS", 1)
    monkeypatch.setattr(build, "BATCH", 100)
    monkeypatch.setattr(build, "processes", lambda: 3)
    notes = alone.ledger.notes
    ledger = list(alone.ledger.rows())
    shutil.rmtree(alone.folder)
    again = load(path, on_bad_row="skip")
    assert again.fingerprint == alone.fingerprint
    assert (again.ledger.kept, again.ledger.notes) == (1201, notes) == (1201, {"truncated": 21})
    assert list(again.ledger.rows()) == ledger and len(ledger) == 2


def test_a_fault_in_a_process_is_told_as_if_it_were_here(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MANY_ROWS", 1)
    monkeypatch.setattr(build, "processes", lambda: 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:14: length: 132 tokens, train.max_length is 128"):
        load(write_jsonl(tmp_path / "rows.jsonl", ROWS), overlong="error")


def test_publishing_after_somebody_else_keeps_theirs(load: Load, rows_file: Path, tmp_path: Path) -> None:
    """Without the lock (another machine on a shared disk) two builds race to the rename."""
    data = load(rows_file)
    place = data.folder
    stamp = (place / "manifest.json").stat().st_mtime_ns
    writer = build.Writer(place)
    writer.add(data.document(0), 0, Row("x", 1, {}))
    writer.publish({"read": 1})
    assert (place / "manifest.json").stat().st_mtime_ns == stamp
    assert not list((tmp_path / "cache").glob(".building-*"))


def test_notes_name_the_first_rows_and_what_is_lost_in_them(load: Load, tmp_path: Path) -> None:
    says = {"role": "assistant", "content": "b"}
    rows = [{"messages": [{"role": "user", "content": "a"}, says]}]
    rows += [{"messages": [{"role": "user", "content": f"<|im_end|>{n}"}, says]} for n in range(6)]
    rows += [
        {"messages": [{"role": "user", "content": "a"}, says | {"title": f"A book {n}"}]} for n in range(2)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dump(*rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:8: messages\[1\]\.title: .* 'A book 0'"):
        load(path=str(path))
    ledger = load(path=str(path), on_lost_content="warn").ledger
    assert ledger.notes == {"control_text": 6, "lost_content": 2}
    assert ledger.noted["control_text"] == [f"{path}:{line}" for line in range(2, 7)]
    assert ledger.noted["lost_content"] == [f"{path}:{line} messages[1].title" for line in (8, 9)]
    control, lost = worries(ledger)
    assert control.startswith("6 rows") and control.endswith(f"{path}:6, …)")
    assert lost.startswith("2 rows") and lost.endswith(f"{path}:9 messages[1].title)")
    kept = load(path=str(path), on_bad_row="skip")
    assert len(kept) == 7 and [row.reason for row in kept.ledger.rows()] == ["bad_row"] * 2
