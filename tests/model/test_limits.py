"""What a model can take is read off its modules."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.model.limits import Limits, limits_in, limits_of
from tests import tiny

SMALL = dict(vocab_size=263, n_positions=100, n_embd=64, n_layer=1, n_head=4, rotary_dim=16)
TABLES = {
    "opt": dict(tiny.ARCHITECTURES["opt"], max_position_embeddings=100),
    "gpt2": SMALL,
    "gptj": SMALL,
    "codegen": SMALL,
    "mpt": dict(vocab_size=263, d_model=64, n_heads=4, n_layers=1, max_seq_len=100),
    "gpt_neo": dict(
        vocab_size=263,
        max_position_embeddings=100,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    ),
}


@pytest.mark.parametrize("architecture", TABLES)
def test_a_table_of_positions_ends_and_it_is_known_where(architecture: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TABLES[architecture]))
    assert limits_of(model) == Limits(263, 100, table=True)
    model(input_ids=torch.ones((1, 100), dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.ones((1, 110), dtype=torch.long))


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name not in TABLES])
def test_rotary_positions_go_on(tmp_path, architecture: str) -> None:
    folder = tiny.save(tmp_path, architecture, max_position_embeddings=64)
    found = limits_in(str(folder))
    assert found == Limits(263, 64, table=False)
    assert found.room(60, 10) == 10


def test_room_is_what_the_table_leaves() -> None:
    assert [Limits(263, 100, table=True).room(width, 10) for width in (50, 95, 100, 120)] == [10, 5, 0, 0]
