import json

from qlora_trainer.data import DataOptions, load_tokenized
from qlora_trainer.evaluate.held_out import HeldOut
from tests import tiny


def test_batches_and_questions_show_the_same_rows(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in [("a much longer question than the others", "eins"), ("two?", "zwei"), ("three?", "drei")]
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = tiny.tokenizer()
    options = DataOptions(eval_path=str(path), path=str(path))
    data = load_tokenized(options, tokenizer, max_length=128, role="eval", cache_dir=tmp_path)
    found = HeldOut.of(data, tokenizer, 0, task="exact_match", batch_size=2)
    assert [question.reference for question in found.questions] == ["eins", "zwei", "drei"]
    assert "two?" in found.questions[1].text and found.questions[1].source == str(path)
    assert sorted(row for batch in found.batches for row in batch.rows) == [0, 1, 2]
    assert sum(batch.n_supervised for batch in found.batches) == data.n_supervised
    assert min(batch.input_ids.shape[1] for batch in found.batches) < data.lengths.max()
    first = HeldOut.of(data, tokenizer, 0, task="exact_match", max_rows=1)
    assert len(first.questions) == 1 and first.batches[0].rows == (0,)
    assert HeldOut.of(data, tokenizer, 0).questions == []
