import torch

from qlora_trainer.data.batch import IGNORE
from qlora_trainer.evaluate.questions import answer_start, documents, questions
from tests import tiny
from tests.batches import collate


def test_a_question_is_the_last_answer_and_all_before_it():
    tokenizer = tiny.tokenizer()
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "eins"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "zwei"},
    ]
    prompt = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    batch = collate([[torch.tensor(whole)], [torch.arange(6, 40)]], supervised_from=len(prompt))
    batch.labels[0, len(whole) - 1] = IGNORE  # the newline after the last turn
    batch.labels[1] = IGNORE
    (found,) = questions([batch], tokenizer, [tokenizer.eos_token_id])
    assert list(found.prompt_ids) == prompt
    assert found.reference == "zwei" and "two?" in found.text
    assert questions([batch], tokenizer, [tokenizer.eos_token_id], limit=0) == []


def test_documents_come_out_of_packing_and_padding_as_they_went_in():
    rows = [[torch.arange(6, 10), torch.arange(20, 23)], [torch.arange(30, 32)]]
    found = [ids for ids, _ in documents([collate(rows)])]
    assert found == [document.tolist() for row in rows for document in row]


def test_the_answer_starts_at_the_last_run_of_labels():
    assert answer_start([IGNORE, 5, IGNORE, 6, 7, IGNORE]) == 3
    assert answer_start([IGNORE, IGNORE]) == 2
    assert answer_start([4, 5]) == 0
