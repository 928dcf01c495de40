"""A chat template compiled: Jinja as transformers sets it up, with limits on what a rendering may cost.

Comes in: Jinja source. Goes out: `Compiled`, whose `render` gives the text and what lies between
`{% generation %}` tags. A template comes with a model, from anywhere, and Jinja's own sandbox keeps it from
files and attributes, not from the machine's time and memory. So a rendering has a purse, and pays for

* each round of a loop, each call of a macro, filter or method (`range(100000)` twice nested, recursion);
* each character that `+`, `*`, `%`, `~`, filters, methods and output make (`'A' * 10**10`), before it is
  made where one step can make much of little;
* each element of a list or an object that becomes text or is compared (`[x, x]` nested sixty times).

The limits are counts, not seconds: a long conversation on a slow machine is not stopped, and what is stopped
is stopped everywhere. The longest conversations need less than a tenth of them.

Otherwise the environment is that of transformers (utils/chat_template_utils.py): trim_blocks,
lstrip_blocks, loop controls, the `generation` tag, `tojson`, `raise_exception`, `strftime_now`. Three things
differ: the clock stands at TODAY, `lipsum` (random text) is not there, and the tag is always followed.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from types import TracebackType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime.date(2024, 7, 26)  # what Llama 3's template prints without a clock
ROUNDS = 5_000_000  # of loops, and elements, in one rendering; one takes about 0.3 µs
CALL, MACRO = 8, 16  # rounds that a call of a filter or method, or of a macro, takes the time of
CHARACTERS = 2**30  # made in one rendering
BITS = 2**20  # of a whole number
# Filters that cost next to nothing, those that walk over elements, and those of a text that C does at once;
# any other may look at each character.
CHEAP = {"abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length"}
CHEAP |= {"random", "reverse", "round"}
WALKING = {"map", "reject", "rejectattr", "select", "selectattr"}
QUICK = {"capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "upper"}
SPLITTING = {"rsplit", "split", "splitlines"}  # methods
# Filters, and methods, whose result can be much longer than what they are given: as much as its product.
GROWING = {"batch", "format", "indent", "join", "replace", "slice", "tojson", "wordwrap", "xmlattr"}
GROWING |= {"center", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
COMPARING = {"eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan"}
COMPARING |= {"ge", ">=", "in"}
COSTLY = GROWING | SPLITTING | {"count", "format_map", "index"}  # methods that are measured
AT_ONCE = QUICK | COMPARING | GROWING  # filters and tests that do not take a text to pieces
_TEXT = (str, bytes)
_OPEN = (Collection, Namespace)
_CLOSED = (Context, range)  # collections that are never written out element by element
_VALUES = (str, bytes, int, list, tuple, dict)
# A width that pads, or one taken from a value: `%999999d` and `%*d`, `{:999999}` and `{:{}}`.
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{6}|\{)")


class OverLimit(SecurityError):
    """A rendering that costs more than any conversation does."""


class Purse:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.rounds, self.characters = ROUNDS, CHARACTERS

    def go(self, rounds: int) -> None:
        """Pay for rounds of a loop."""
        self.rounds -= rounds
        if self.rounds < 0:
            raise OverLimit(f"more than {ROUNDS:,} rounds of loops, or as much of calls and elements")

    def make(self, characters: int) -> None:
        """Pay for characters."""
        self.characters -= characters
        if self.characters < 0:
            self._too_much()

    def afford(self, characters: int) -> None:
        """Refuse what could not be paid, without paying."""
        if characters > self.characters:
            self._too_much()

    def _too_much(self) -> NoReturn:
        raise OverLimit(f"more than {CHARACTERS:,} characters")

    def measure(self, value: Any) -> int:
        """Characters in a value, roughly, and those of all its elements, which are paid for as rounds."""
        if isinstance(value, _TEXT):
            return len(value)
        if not isinstance(value, _OPEN) or isinstance(value, _CLOSED):
            return value.bit_length() // 3 if isinstance(value, int) else 1
        characters = 0
        open_: list[Iterator[Any]] = [iter((value,))]
        while open_:
            for item in open_[-1]:
                if isinstance(item, _TEXT):
                    characters += len(item)
                elif isinstance(item, Namespace):
                    raise OverLimit("a namespace as text")  # its representation could be of any size
                elif isinstance(item, Collection) and not isinstance(item, _CLOSED):
                    self.go(len(item))
                    open_.append(iter(item))
                    if isinstance(item, Mapping):
                        open_.append(iter(item.values()))
                    break
                else:
                    characters += 1
            else:
                open_.pop()
        return characters


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which everything that can grow pays from `purse`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        self.purse = Purse()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=self._shown,
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        self.filters["tojson"] = _tojson
        for name in self.filters.keys() - CHEAP:
            self.filters[name] = self._limited(self.filters[name], name)
        for name in COMPARING:
            self.tests[name] = self._limited(self.tests[name], name)
        self.filters |= {_ROUND: self._round, _CONCAT: self._concat, _SEEN: self._seen}

    def parsed(self, source: str) -> nodes.Template:
        """The syntax tree, with a toll in each body that can run again and around each `~` and `==`."""
        tree = self.parse(source)
        bodies: list[Any] = list(tree.find_all((nodes.For, nodes.Macro)))
        for loop in bodies:
            fixed = sum(len(part.data) for part in loop.find_all(nodes.TemplateData)) + sum(
                len(part.value) for part in loop.find_all(nodes.Const) if isinstance(part.value, str)
            )
            price = (MACRO if isinstance(loop, nodes.Macro) else 1, fixed)
            toll = nodes.ExprStmt(_filter(nodes.Const(price), _ROUND))
            loop.body.insert(0, toll.set_lineno(loop.lineno, override=True))
        _exchange(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str is type(right):  # in every turn
            self.purse.make(len(left) + len(right))
            return left + right
        if operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(text, int) and isinstance(times, int):
                self._whole(text.bit_length() + times.bit_length())
            elif isinstance(text, _TEXT) and isinstance(times, int):
                self.purse.make(len(text) * times)
            elif isinstance(text, Collection) and isinstance(times, int):
                self.purse.go(len(text) * times)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                self._whole(left.bit_length() * max(right, 0))
        elif operator == "+":
            if isinstance(left, Collection) and isinstance(right, Collection):
                self.purse.go(len(left) + len(right))
        elif isinstance(left, str):
            self._format(WIDE_PERCENT, left, (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # `format` comes wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if not isinstance(owner, _VALUES):
            return super().call(__context, __obj, *args, **kwargs)
        if method.__name__ not in COSTLY:
            __self.purse.go(CALL)
            return super().call(__context, __obj, *args, **kwargs)
        args = __self._drained(args)
        named = [value for name, value in kwargs.items() if name not in _HANDED]
        __self._pay(method.__name__, owner, (*args, *named), is_filter=False)
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def _limited(self, function: Any, name: str) -> Callable[..., Any]:
        quick = name in AT_ONCE - GROWING

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            if quick and type(args[0]) is str and (len(args) == 1 or type(args[1]) is str):
                self.purse.go(1)  # `trim`, `eq` and their like, in every turn
                return self._made(function(*args, **kwargs))
            args = self._drained(args)
            given = [value for value in args if not isinstance(value, _SURROUNDINGS)]
            self._pay(name, given[0] if given else "", (*given[1:], *kwargs.values()), is_filter=True)
            return self._made(function(*args, **kwargs))

        return limited

    def _drained(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Generators as lists, each element paid for, so that all of it can be measured."""
        return tuple(list(self._paid(value)) if isinstance(value, Iterator) else value for value in values)

    def _paid(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.purse.go(1)
            yield item

    def _pay(self, name: str, subject: Any, others: tuple[Any, ...], is_filter: bool) -> None:
        """Pay for a filter, test or method, and refuse one whose result could be over the limit."""
        elements = len(subject) if isinstance(subject, Collection) else 0
        self.purse.go(CALL + elements * (name in WALKING))
        if name in WALKING:
            return
        sizes = [self.purse.measure(value) for value in others]
        size = self.purse.measure(subject) + 1
        if name in ("format", "format_map") and isinstance(subject, str):
            self._format(WIDE_PERCENT if is_filter else WIDE_BRACES, subject, others)
        elif (name not in AT_ONCE if is_filter else name in SPLITTING) and isinstance(subject, _TEXT):
            at = next((value for value in others if isinstance(value, type(subject)) and value), None)
            self.purse.go(elements // 4 if at is None else subject.count(at))  # type: ignore[arg-type]
        elif name in GROWING:
            numbers = [value for value in others if isinstance(value, int)]
            self.purse.afford((size + elements) * max([1, *sizes, *numbers]))

    def _format(self, wide: re.Pattern[str], text: str, values: tuple[Any, ...]) -> None:
        if wide.search(text.replace("{{", "")):
            raise OverLimit("a format with a width over 99,999, or one taken from a value")
        self.purse.afford((len(text) + 1) * max([1, *map(self.purse.measure, values)]))

    def _whole(self, bits: int) -> None:
        if bits > BITS:
            raise OverLimit(f"a whole number of more than {BITS:,} bits")

    def _made(self, value: Any) -> Any:
        if isinstance(value, str | bytes):
            self.purse.make(len(value))
        return value

    def _shown(self, value: Any) -> Any:
        self.purse.make(len(value) if isinstance(value, str) else self.purse.measure(value))
        return value

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, str):
            self.purse.measure(value)
        return value

    def _concat(self, values: tuple[Any, ...]) -> str:
        return "".join(str(self._shown(value)) for value in values)

    @jinja2.pass_context  # so that it is not called at compile time, as what needs no context is
    def _round(self, context: Context, price: tuple[int, int]) -> str:
        rounds, characters = price
        self.purse.go(rounds)
        self.purse.make(characters)
        return ""


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant says, as transformers reads it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written = 0  # characters before the piece that is being made
        self.blocks: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.blocks.append((self.written, self.written + len(text)))
        return text


class Compiled:
    """A template ready to render. Raises jinja2.TemplateSyntaxError where it is not Jinja."""

    def __init__(self, source: str) -> None:
        self._environment = Environment()
        self._tag: Any = self._environment.extensions[Generation.identifier]
        self._template = self._environment.from_string(self._environment.parsed(source))

    def render(self, **values: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, stop) in it of each `generation` block.

        Raises whatever Python raises in a template, a jinja2.TemplateError where the template itself
        refuses (`raise_exception`), and OverLimit.
        """
        self._environment.purse = Purse()
        self._tag.written, self._tag.blocks = 0, []
        pieces = []
        for piece in self._template.generate(**values):
            pieces.append(piece)
            self._tag.written += len(piece)
        return "".join(pieces), self._tag.blocks


def line_of(error: BaseException) -> int | None:
    """The template's line at which a rendering failed; None if it did not fail inside the template."""
    line = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":  # Jinja writes its traces so
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


_HANDED = ("_loop_vars", "_block_vars")  # what Jinja itself hands to calls
_SURROUNDINGS = (Context, jinja2.Environment, nodes.EvalContext)  # what Jinja itself hands to filters
_ROUND, _CONCAT, _SEEN = "(round)", "~", "(seen)"  # names that no template can write


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _exchange(node: nodes.Node) -> None:
    """Put filters of ours in place of `~`, and around what is compared with something not written out."""
    for child in list(node.iter_child_nodes()):
        _exchange(child)
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_exchanged(item) for item in value]
        else:
            setattr(node, field, _exchanged(value))
    if isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if not any(isinstance(side, nodes.Const) for side in sides):
            node.expr = _filter(node.expr, _SEEN)
            for operand in node.ops:
                operand.expr = _filter(operand.expr, _SEEN)


def _exchanged(item: Any) -> Any:
    if isinstance(item, nodes.Concat):
        return _filter(nodes.Tuple(item.nodes, "load", lineno=item.lineno), _CONCAT)
    return item


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
