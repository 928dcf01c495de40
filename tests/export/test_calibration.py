"""Calibration: equal sequences of the run's own tokens, none used twice, and too few said before any work."""

import copy

import pytest
import torch

from qlora_trainer.data import DataOptions, load_tokenized
from qlora_trainer.errors import DataError
from qlora_trainer.export.calibration import load_text, made_up, sequences, shares
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


def test_several_sources_share_the_sequences():
    assert shares(128, 1) == [128] and shares(128, 2) == [64, 64] and shares(8, 3) == [3, 3, 2]


def test_the_base_makes_up_text_that_is_its_own_and_the_seeds():
    model = tiny.model().eval()
    found = made_up(model, tiny.tokenizer(), 4, 32, seed=1)
    assert [len(sequence) for sequence in found] == [32] * 4
    assert {sequence[0] for sequence in found} == {tiny.tokenizer().bos_token_id}
    assert (
        found == made_up(model, tiny.tokenizer(), 4, 32, seed=1) != made_up(model, tiny.tokenizer(), 4, 32, 2)
    )
    sharp = tiny.model().eval()
    sharp.lm_head.weight.data *= 1e4  # now one token is certain: what is drawn follows the model
    with torch.no_grad():
        ids = torch.tensor(made_up(sharp, tiny.tokenizer(), 1, 32, seed=1))
        assert torch.equal(sharp(input_ids=ids).logits[0, :-1].argmax(-1), ids[0, 1:])
    bare = copy.deepcopy(tiny.tokenizer())  # tests share it
    bare.bos_token = None
    begun = {sequence[0] for sequence in made_up(model, bare, 4, 8, seed=1)}
    assert len(begun) > 1 and max(begun) < 263
