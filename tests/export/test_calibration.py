"""Calibration: equal sequences of the run's own tokens, none used twice, and too few said before any work."""

import pytest

from qlora_trainer.data import DataOptions, load_tokenized
from qlora_trainer.errors import DataError
from qlora_trainer.export.calibration import load_text, sequences
from tests import tiny


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(f"row {n:03} of many, each of its own words {n * 7919}" for n in range(60)))
    options = DataOptions(path=str(path), format="text", cache_dir=str(tmp_path / "cache"))
    return load_tokenized(options, tiny.tokenizer(), max_length=128)


def test_sequences_are_equal_long_whole_documents_and_the_seeds_own(data):
    found = sequences(data, 5, 100, seed=3)
    assert [len(sequence) for sequence in found] == [100] * 5
    assert found == sequences(data, 5, 100, seed=3) != sequences(data, 5, 100, seed=4)
    starts = {tuple(data.document(index).ids.tolist()[:20]) for index in range(len(data))}
    begun = [tuple(sequence[:20]) for sequence in found]
    assert set(begun) <= starts and len(set(begun)) == 5


def test_too_few_rows_are_said_with_how_many_there_are(data):
    with pytest.raises(
        DataError, match=r"calibration_samples=500 .*calibration_length=100 .*fills only \d+; lower one"
    ):
        sequences(data, 500, 100, seed=3)


def test_any_file_that_training_reads_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "something else entirely, and long enough to be cut"}\n' * 40)
    found = sequences(load_text(str(path), tiny.tokenizer(), 64, 4), 4, 64, seed=0)
    assert tiny.tokenizer().decode(found[0]).startswith("something else")
