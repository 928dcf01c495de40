"""Templates run as transformers runs them, and none costs more than its limits."""

from __future__ import annotations

import datetime
import resource

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data import sandbox
from qlora_trainer.data.sandbox import TODAY, Compiled, OverLimit, line_of
from tests.data.families import FAMILIES, tokenizer

NESTED = "{% set ns = namespace(x=1, y=1) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"  # noqa: E501
DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = OP %}{% endfor %}"


def theirs(source: str, **values: object) -> str:
    """What transformers renders, on our day."""
    messages = values.pop("messages", [])
    texts, _ = render_jinja_template([messages], chat_template=source, strftime_now=TODAY.strftime, **values)
    return texts[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_family_renders_as_in_transformers(family: str, prompt: bool) -> None:
    tok = tokenizer(family)
    constants = {name: str(token) for name, token in tok.special_tokens_map.items()}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "é": [1.5, None, "<&>"]}}}
    conversations = [
        [{"role": "user", "content": " Hi <b>\n"}, {"role": "assistant", "content": " It's 2 & 3 "}],
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "five", "reasoning_content": "2 and 3"},
        ],
    ]
    for messages in conversations[: 2 if family.startswith(("qwen", "llama3")) else 1]:
        values = {"messages": messages, "add_generation_prompt": prompt, **constants}
        text, _ = Compiled(tok.chat_template).render(tools=None, documents=None, **values)
        assert text == theirs(tok.chat_template, **values)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' ~ none ~ 3 ~ {}.q ~ [1, 'a'] }}{{ 1 == 2 }}{{ [1] == [1] }}{{ messages == tools }}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{% else %}none{% endfor %}",
        "{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}={{ v }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",  # noqa: E501
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3)|upper|trim }}",
        "{% for i in [[1, [2]], 3] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
        "{{ '{{}} {}: {:>5}|{a}'.format(1, 2, a=3) }}{{ '%s'|format(1) }}",
        "{{ '%-4s|%03d %%' % ('a', 1700000000) }}{{ '100% *{}'.format(1) }}{{ '{a}'.format_map({'a': 1}) }}",
        "{{ [3, 1]|sort|join('-') }}{{ 'a-b'|replace('-', '+') }}{{ 'a b'.split()|map('upper')|list }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}",
        "{{ {'a': 'é', 'b': [1, 2.5, true]}|tojson(indent=2) }}{{ 'x'|indent(2, true) }}{{ 'q'.center(9) }}",
        "{% set x %}a{{ 'b' * 3 }}{{ [0] * 2 + [1] }}{% endset %}{{ x }}{{ x is eq('abbb') }}{{ 2 ** 10 }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.get('role') }}"
        "{% for k, v in m.items() %}{{ k ~ ns.n }}{% endfor %}{% endfor %}",
        "{{ messages[::-1][0].content[1:] }}{{ messages|length - 1 }}{{ 'a' in 'abc' }}{{ 5 in [1, 5] }}",
    ],
)
def test_operators_filters_and_methods_do_what_they_do_in_transformers(source: str) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    text, _ = Compiled(source).render(messages=messages, tools=None, documents=None)
    assert text == theirs(source, messages=messages)


def test_generation_blocks_are_those_of_transformers() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}!{% endgeneration %}\n"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": f"{n}"} for n, role in enumerate(["user", "assistant"] * 2)]
    texts, blocks = render_jinja_template([messages], chat_template=source, return_assistant_tokens_mask=True)
    assert Compiled(source).render(messages=messages) == (texts[0], blocks[0])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'A' * 10**10 }}",
        "{{ 10000000000 * 'A' }}",
        "{{ ['a'] * 1000000000 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (10 ** 300000) * (10 ** 300000) }}",
        DOUBLED.replace("OP", "ns.x + ns.x"),
        DOUBLED.replace("OP", "ns.x ~ ns.x"),
        DOUBLED.replace("OP", "[ns.x, ns.x]|join"),
        DOUBLED.replace("OP", "ns.x.replace('a', 'aa')"),
        NESTED + "{{ ns.x }}",
        NESTED + "{{ ns.x|tojson }}",
        NESTED + "{{ ns.x == ns.y }}",
        NESTED + "{{ ns.x is eq(ns.y) }}",
        NESTED + "{{ '%s' % (ns.x,) }}",
        "{% set ns = namespace(a=1) %}{{ ns }}",
        "{{ 'A'|center(10000000000) }}",
        "{{ 'A'.ljust(10000000000) }}",
        "{{ 'A'|indent(1000000000, true) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10000000000) }}",
        "{{ '\t'.expandtabs(10000000000) }}",
        "{{ [1]|slice(1000000000)|list }}",
        "{{ [1]|batch(1000000000, 'x')|list }}",
        "{{ ('a' * 900000)|list }}",
        "{{ ('a,' * 400000).split(',') }}",
        "{{ ('a' * 900000)|max }}",
        "{{ ('a' * 900000)|reject|first|string }}",
        "{% set x %}{% for i in range(999) %}" + "abc" * 1000 + "{% endfor %}{% endset %}",
    ],
)
def test_a_template_that_makes_much_of_little_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "ROUNDS", 50_000)  # the limits' kind is tested, at a hundredth of their size
    monkeypatch.setattr(sandbox, "CHARACTERS", 1_000_000)
    with pytest.raises(OverLimit):
        Compiled(source).render(messages=[])


def test_the_true_limits_stop_a_loop_and_a_long_text() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OverLimit, match="rounds of loops"):
        Compiled(
            "\n{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
        ).render()
    with pytest.raises(OverLimit, match="characters"):
        Compiled("{{ 'A' * 10**10 }}").render()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB: refused before made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_conversations_are_far_from_the_limits(family: str) -> None:
    """1,000 turns of 1 kB, and one of 4 MB: at most a fiftieth of the rounds, a tenth of the characters."""
    compiled = Compiled(FAMILIES[family].template)
    for count, size in ((1000, 1000), (2, 4_000_000)):
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": "word " * (size // 5)} for n in range(count)
        ]
        text, _ = compiled.render(
            messages=messages, tools=None, add_generation_prompt=False, bos_token="<s>", eos_token="</s>"
        )
        purse = compiled._environment.purse
        assert len(text) > count * (size - 1)
        assert sandbox.ROUNDS - purse.rounds < sandbox.ROUNDS / 50
        assert sandbox.CHARACTERS - purse.characters < sandbox.CHARACTERS / 10


@pytest.mark.parametrize(
    ("source", "error", "line"),
    [
        ("a\n{{ 1 + 'a' }}", TypeError, 2),
        ("a\n\n{{ {}.x.y }}", jinja2.UndefinedError, 3),
        ("{{ 1 / 0 }}", ZeroDivisionError, 1),
        ("{% macro f() %}\n{{ [].x.y }}\n{% endmacro %}\n{{ f() }}", jinja2.UndefinedError, 2),
        ("\n{{ raise_exception('no') }}", jinja2.TemplateError, 2),
        ("{{ lipsum(n=1000) }}", jinja2.UndefinedError, 1),
        ("{% include '/etc/passwd' %}", TypeError, 1),
    ],
)
def test_an_error_knows_its_line(source: str, error: type[Exception], line: int) -> None:
    with pytest.raises(error) as caught:
        Compiled(source).render(messages=[])
    assert line_of(caught.value) == line


def test_the_sandbox_is_closed_and_its_clock_stands() -> None:
    assert Compiled("{{ ''.__class__ }}{{ [].append }}").render()[0] == ""
    with pytest.raises(jinja2.exceptions.SecurityError):
        Compiled("{{ messages.append(1) }}").render(messages=[])
    day = datetime.date(2024, 7, 26)
    assert Compiled("{{ strftime_now('%d %b %Y') }}").render()[0] == f"{day:%d %b %Y}"
