import pytest

from qlora_trainer.evaluate.match import Answer, Question, match


def question(reference):
    return Question((1, 2), reference, "prompt")


@pytest.mark.parametrize(
    ("reference", "text", "exact", "json_equal"),
    [
        ('{"a":1,"b":null}', '{"a":1,"b":null}\n', True, True),
        ('{"a":1,"b":null}', '{ "b": null, "a": 1 }', False, True),
        ('{"a":1}', '{"a":"1"}', False, False),
        ('{"a":1}', '{"a":true}', False, False),
        ('{"a":1}', '{"a":1} and more', False, False),
        ("yes", "yes ", True, False),
        ("yes", "Yes", False, False),
    ],
)
def test_equal_text_and_equal_json_value(reference, text, exact, json_equal):
    answer = Answer(question(reference), text)
    assert (answer.exact, answer.json_equal) == (exact, json_equal)


def test_shares_and_json_only_where_all_references_are_json():
    both = match([question('{"a":1}'), question("[2]")], ['{"a": 1}', "[3]"])
    assert both.exact == 0 and both.json_equal == 0.5
    assert match([question('{"a":1}'), question("17")], ["", "17"]).json_equal is None
