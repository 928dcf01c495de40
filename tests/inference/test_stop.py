from transformers import GenerationConfig

from qlora_trainer.inference.stop import end_of_turn_id, pad_id, stop_ids
from tests import tiny


def test_the_template_tells_which_token_closes_a_turn():
    tokenizer = tiny.tokenizer()
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_end_of_sequence_template_and_stored_defaults_all_stop():
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.eos_token = "</s>"
    end, turn = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert stop_ids(tokenizer) == sorted([end, turn])
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[77])) == sorted([end, turn, 77])
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == [end]


def test_without_a_pad_token_a_stop_token_fills():
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer())
    assert pad_id(tokenizer, [2]) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer, [2]) == 2
