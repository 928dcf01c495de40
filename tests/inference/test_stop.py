import copy

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig

from qlora_trainer.data.encode import Encoder, Masking
from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.templates import resolve_template
from qlora_trainer.errors import ConfigError
from qlora_trainer.inference.stop import end_of_turn_id, pad_id, stop_ids
from tests import tiny
from tests.data.families import FAMILIES, base, tokenizer

TURNS = Example(
    (
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
    )
)


def taught_last(tokenizer) -> list[int]:
    """The last supervised token of each turn."""
    template = resolve_template(None, tokenizer, ["messages"])
    encode = Encoder(tokenizer, template, max_length=999, overlong="drop", masking=Masking())
    [[document]] = encode([TURNS])
    ends = np.flatnonzero(np.diff(np.append(document.weights > 0, False).astype(int)) == -1)
    return document.ids[ends].tolist()


def plainly_ended():
    """A tokenizer whose template ends turns with an added token that is not special, and is not EOS."""
    made = copy.deepcopy(tiny.tokenizer())
    made.eos_token = "</s>"
    made.add_tokens([AddedToken("<|done|>", special=False, normalized=False)])
    made.chat_template = tiny.CHATML.replace("<|im_end|>", "<|done|>")
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_at_what_the_masks_teach_last(family):
    made = tokenizer(family)
    end = end_of_turn_id(made)
    assert taught_last(made) == [end, end]
    assert set(stop_ids(made)) == {end, made.eos_token_id}


def test_a_turn_may_end_with_an_added_token_that_is_not_special():
    made = plainly_ended()
    done = made.convert_tokens_to_ids("<|done|>")
    assert done not in made.all_special_ids
    assert taught_last(made) == [done, done]
    assert end_of_turn_id(made) == done and stop_ids(made) == sorted([done, made.eos_token_id])


def test_the_template_tells_which_token_closes_a_turn():
    made = tiny.tokenizer()
    assert end_of_turn_id(made) == made.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(base()) is None
    refusing = copy.deepcopy(made)
    refusing.chat_template = "{{ raise_exception('only with a system turn') }}"
    assert end_of_turn_id(refusing) is None and stop_ids(refusing) == [refusing.eos_token_id]


def test_end_of_sequence_template_and_stored_defaults_all_stop():
    made = copy.deepcopy(tiny.tokenizer())
    made.eos_token = "</s>"
    end, turn = made.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert stop_ids(made) == sorted([end, turn])
    assert stop_ids(made, GenerationConfig(eos_token_id=[77])) == sorted([end, turn, 77])
    made.chat_template = None
    assert stop_ids(made) == [end]


def test_without_a_pad_token_a_stop_token_fills():
    made = copy.deepcopy(tiny.tokenizer())
    assert pad_id(made, [2]) == made.pad_token_id
    made.pad_token = None
    assert pad_id(made, [2]) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "stopped: it makes",
        ),
        ("{% for m in messages %}", "line 1: "),
    ],
)
def test_a_template_that_never_ends_or_is_none_is_refused_wherever_stops_are_asked_for(template, said):
    made = copy.deepcopy(tiny.tokenizer())
    made.chat_template = template
    with pytest.raises(ConfigError, match=f"the tokenizer's own, .*{said}"):
        stop_ids(made)
