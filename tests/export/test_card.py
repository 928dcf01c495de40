import re

import yaml

from qlora_trainer.export.card import Card, markdown_table, render, with_measured

CARD = Card(
    title="demo",
    base="owner/model",
    revision="abc",
    licence="apache-2.0",
    made="A LoRA adapter.",
    data=["/home/somebody/secret place/rows.jsonl", "builtin:restaurant"],
    settings={
        "data": {"path": "~/rows.jsonl", "split": None},
        "lora": {"r": 16},
        "track": {"note": "hf_" + "abcdefghijklmnop" * 2},
        "empty": {"x": None},
    },
    load="print(FOLDER)",
)


def test_a_card_names_data_and_settings_but_no_folders_and_no_tokens():
    text = render(CARD)
    assert "somebody" not in text and "hf_abc" not in text and "~/" not in text
    assert "`rows.jsonl`" in text and "`builtin:restaurant`" in text
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "owner/model" and head["license"] == "apache-2.0"
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert settings == {
        "data": {"path": "rows.jsonl"},
        "lora": {"r": 16},
        "track": {"note": "***"},
    }


def test_the_measured_table_can_be_put_in_later_and_again():
    text = render(CARD)
    assert "Not measured yet." in text
    table = markdown_table(["model", "KL"], [["trained", "0"], ["a|b", "0.1"]])
    once = with_measured(text, table)
    assert "| trained | 0 |" in once and "Not measured" not in once and "a\\|b" in once
    assert with_measured(with_measured(text, "other"), table) == once
