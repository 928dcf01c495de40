"""What a step depends on is said by the schema, key by key, and is what makes two starts the same run."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any

import pytest

from qlora_trainer.config import keys, schema
from qlora_trainer.config.facts import CONTENT, FREE, LENGTH, SAME
from qlora_trainer.config.frozen import as_dict, flat
from qlora_trainer.config.identity import identity
from qlora_trainer.config.schema import FACTS, RunConfig

# No step depends on these, by thought and not by default: a key that moves here moves with a reason.
MAY_CHANGE = {
    "recipe", "output_dir", "run",
    "model.offload", "model.cache_quantized", "data.eval_path", "data.cache_dir", "data.num_workers",
    "train.activations", "train.logging_steps", "optim.resident_gib", "quantization.allow_partial",
    *(key for key in FACTS if key.startswith(("checkpoint.", "track.", "evaluate.", "plan."))),
    *(key for key in FACTS if key.startswith(("chat.", "export."))),
}  # fmt: skip


def written(**changes: Any) -> dict[str, Any]:
    return dict(flat(as_dict(RunConfig()))) | changes


def test_every_key_says_what_it_is() -> None:
    assert set(FACTS) == set(keys.KEYS)
    assert all(facts.meaning and facts.by for facts in FACTS.values())


def test_a_field_that_does_not_say_is_noticed() -> None:
    silent = make_dataclass("Silent", [("new", int, field(default=1))])
    with pytest.raises(AssertionError, match=r"model\.new does not say what it is"):
        dict(schema._facts(silent(), "model."))


def test_only_what_no_step_depends_on_may_change() -> None:
    assert {key for key, facts in FACTS.items() if facts.resume is FREE} == MAY_CHANGE
    assert {key for key, facts in FACTS.items() if facts.resume is LENGTH} == {
        "train.max_steps",
        "train.num_train_epochs",
    }


def test_conditions_are_about_keys_that_exist_and_values_they_can_have() -> None:
    from qlora_trainer.config import checks

    for key, facts in FACTS.items():
        if facts.when is not None:
            assert set(facts.when.keys) <= set(FACTS), key
            for name in facts.when.keys:
                allowed = {**checks.CHOICES, **checks.LISTS}.get(name)
                assert allowed is None or set(getattr(facts.when, "values", ())) <= set(allowed), key


@pytest.mark.parametrize("key", sorted(key for key, facts in FACTS.items() if facts.resume is SAME))
def test_the_identity_has_every_key_that_a_step_depends_on(key: str) -> None:
    assert identity(written())[key] == written()[key]
    assert identity(written(**{key: "another"}))[key] == "another"


def test_a_key_without_effect_does_not_count() -> None:
    off = {"quantization.bnb_4bit_use_double_quant": False}
    assert identity(written(**off))["quantization.bnb_4bit_use_double_quant"] is False
    none = {"quantization.method": "none"}
    assert identity(written(**none, **off)) == identity(written(**none))


def test_names_of_content_are_asked_for_by_kind() -> None:
    assert "data.path" not in identity(written()) and identity(written(), CONTENT)["data.path"] is None
    assert "lora.r" not in identity(written(), CONTENT)
