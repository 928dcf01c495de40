"""Of a folder, the files of the split that is asked for are read, and what is passed over is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_trainer.data import DataOptions
from qlora_trainer.data.folders import files_in
from qlora_trainer.data.sources import Files, open_source
from qlora_trainer.errors import ConfigError, DataError


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    return tmp_path


def read(place: Path, split: str | None = "train") -> list[str]:
    return [str(path.relative_to(place)) for path in files_in(place, split)[0]]


def test_splits_are_told_by_the_names_of_files(tmp_path: Path) -> None:
    place = folder(
        tmp_path,
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl.gz",
        "my_test.csv",
        "dev.jsonl",
        "more.jsonl",
    )
    files, remarks = files_in(place, "train")
    assert [path.name for path in files] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl.gz"]
    assert remarks == [f"{place}: dev.jsonl, more.jsonl, my_test.csv not read: data.split=train"]
    assert read(place, "test") == ["my_test.csv"]
    assert read(place, "validation") == read(place, "val") == read(place, None) == ["dev.jsonl"]
    assert len(read(place, "all")) == 5


def test_splits_are_told_by_the_names_of_folders(tmp_path: Path) -> None:
    place = folder(tmp_path, "data/train/test_of_strength.jsonl", "data/train/b.jsonl", "data/test/a.jsonl")
    assert read(place) == ["data/train/b.jsonl", "data/train/test_of_strength.jsonl"]
    assert read(place, None) == ["data/test/a.jsonl"]
    assert read(place / "data" / "test") == ["a.jsonl"], "the folder that was named is what was asked for"


def test_a_split_of_ones_own_name_is_read_alone(tmp_path: Path) -> None:
    place = folder(tmp_path, "train_sft-0.jsonl", "train_sft-1.jsonl", "train_gen.jsonl", "test_sft.jsonl")
    assert read(place, "train_sft") == ["train_sft-0.jsonl", "train_sft-1.jsonl"]
    assert read(place) == ["train_gen.jsonl", "train_sft-0.jsonl", "train_sft-1.jsonl"]


def test_files_that_name_no_split_are_for_training(tmp_path: Path) -> None:
    place = folder(tmp_path, "trainers.jsonl", "latest.jsonl", "devices.jsonl")
    assert len(read(place)) == len(read(place, None)) == 3
    with pytest.raises(DataError, match="has no split test; it has devices"):
        read(place, "test")
    folder(tmp_path, "test.jsonl")
    assert read(place) == ["devices.jsonl", "latest.jsonl", "trainers.jsonl"]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    place = folder(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(DataError, match=r"has no split train; it has test, validation: set data\.split"):
        read(place)
    with pytest.raises(ConfigError, match="slices and sums are for the hub"):
        read(place, "test[:10]")


def test_papers_beside_data_are_no_rows(tmp_path: Path) -> None:
    place = folder(
        tmp_path,
        "README.md",
        "LICENSE.txt",
        "notes.txt",
        "data/a.jsonl",
        "dataset_infos.json",
        ".cache/b.jsonl",
    )
    files, remarks = files_in(place, "train")
    assert [path.name for path in files] == ["a.jsonl"]
    [remark] = remarks
    assert remark.startswith(f"{place}: LICENSE.txt, README.md, notes.txt not read: text beside data")


def test_one_name_in_two_kinds_is_told(tmp_path: Path) -> None:
    place = folder(tmp_path, "a/train.jsonl", "a/train.csv.gz", "b/train.jsonl")
    assert files_in(place, "train")[1] == [
        f"{place / 'a/train'}: is there as .csv.gz and .jsonl, and all are read: the same rows twice?"
    ]


def test_a_folder_of_texts_is_read_without_its_papers(tmp_path: Path) -> None:
    place = folder(tmp_path, "README.md", "a.md", "b.txt")
    assert read(place) == ["a.md", "b.txt"]
    (place / "a.md").unlink()
    (place / "b.txt").unlink()
    with pytest.raises(DataError, match=r"a folder without \.json .* files but README\.md; check data\.path"):
        read(place)


def test_what_save_to_disk_wrote_is_read_in_its_own_order(tmp_path: Path) -> None:
    import datasets

    rows = [{"instruction": f"q {n}", "output": "a"} for n in range(5)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one" / "cache-12.arrow").write_bytes(b"left by map")
    both = datasets.DatasetDict(train=saved, test=datasets.Dataset.from_list(rows[:1]))
    both.save_to_disk(str(tmp_path / "two"))

    def values(name: str, split: str = "train") -> list[object]:
        options = DataOptions(path=str(tmp_path / name), split=split)
        return [row.value for row in open_source(options.sources("train")[0]).rows()]

    assert values("one") == values("two") == values("two/train") == rows
    assert values("two", "test") == rows[:1]
    assert files_in(tmp_path / "two", "train")[1] == [f"{tmp_path / 'two'}: test not read: data.split=train"]
    assert len(values(".", "all")) == 11, "cache-12.arrow is none of the data"
    with pytest.raises(DataError, match="has no split validation; it has test, train"):
        values("two", "validation")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="arrow: is missing"):
        values("one")
    (tmp_path / "two" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="is not what save_to_disk writes"):
        values("two")


def test_held_out_rows_of_a_folder_are_those_that_its_names_hold_out(tmp_path: Path) -> None:
    place = folder(tmp_path, "train.jsonl", "test.jsonl")
    options = DataOptions(path=str(place), eval_path=str(place))
    [train], [held] = options.sources("train"), options.sources("eval")
    opened = [open_source(source) for source in (train, held)]
    assert all(isinstance(source, Files) for source in opened)
    assert [[path.name for path in source.paths] for source in opened if isinstance(source, Files)] == [
        ["train.jsonl"],
        ["test.jsonl"],
    ]
    document = tmp_path / "both.json"
    document.write_text(json.dumps({"train": [{"text": "a"}], "dev": [{"text": "b"}]}))
    [held] = DataOptions(path=str(document), eval_path=str(document)).sources("eval")
    assert [row.value for row in open_source(held).rows()] == [{"text": "b"}]
    opened = [open_source(held)]
    assert isinstance(opened[0], Files) and opened[0].inside() == [
        f"{document}: train (1 rows) not read: held-out rows are those for validation, or else test"
    ]
    [hub] = DataOptions(path="a/b", eval_path="a/b", split="train_sft").sources("eval")
    assert hub.split == "train_sft"
