"""Where in a rendering each turn's text lies.

Comes in: a template and a checked example. Goes out: a `Rendering`, text plus character spans of what the
assistant says. Tokens come later (`encode.py`); nothing here searches for role markers.

Most stock templates carry no `{% generation %}` tag, so spans are found by rendering, and proved:

* A turn *starts* where the generation prompt ends: `render(messages[:i], add_generation_prompt=True)`
  is exactly what the model is given at inference. It has to be a prefix of the full rendering. Where it is
  not (a prompt opens the turn with `<think>`, and this one has no thought), the turn starts at its content,
  found by a mark, or, where it has a thought or no content, where prompt and rendering part.
* Content *ends* at a mark put behind its last visible character. Trimming templates do not move it, and
  taking all marks out has to give the full rendering again, character for character.
* A turn *stops* with the first end-of-turn text behind its content that the template put there, before
  anything of the next message: what lies between (calls of tools) is the assistant's. Behind it nothing is
  generated, so nothing is taught, not the line break either that many templates put there and TRL supervises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.data.example import THINKING, Example
from qlora_trainer.data.problems import RowError

if TYPE_CHECKING:
    from qlora_trainer.data.chat import ChatTemplate

MARKS = tuple((chr(0xE000 + 2 * n), chr(0xE001 + 2 * n)) for n in range(8))  # private use: no text has them
BORDER = re.compile(r"[\s>\]:]")  # a character that ends a role or a tag
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a rendering that one message put there, and which message.

    Attributes:
        turn: an assistant's whole turn, not bare content.
        closed: it ends with the end-of-turn token's text.
        opened: where the message's part of the rendering begins at the earliest; thoughts that the template
            puts before a turn's start lie behind it.
    """

    start: int
    stop: int
    message: int
    turn: bool
    closed: bool = False
    opened: int = 0


@dataclass(frozen=True)
class Rendering:
    """A conversation as one text, its spans in order, and whether inference gives the same prompts.

    `shadow` is the text with a stand-in for each character of people's text that looks like a control token
    (`control.py`). `as_prompted` is False if some turn's generation prompt is not what stands before it here:
    the template shows the model another conversation at inference than in training.
    """

    text: str
    shadow: str
    spans: tuple[Span, ...] = ()
    as_prompted: bool = True


class HiddenTurnError(RowError):
    """A turn whose place in a rendering cannot be told."""

    def __init__(self, at: int, rendering: Rendering) -> None:
        super().__init__(
            f"messages[{at}]",
            "the chat template rewrites this turn so that its place cannot be told; "
            "mark it with {% generation %} in a template of your own (data.template=FILE)",
        )
        self.rendering = rendering


class Layout:
    """One example's rendering, and the search for its turns."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self.template, self.example, self.tools = template, example, example.tools
        self.messages = template.messages(example.messages)
        self.full, self.blocks = template.rendered(self.messages, False, self.tools)
        self.shadow = template.shadow(self.full, self.messages, self.tools)
        self.turns = [at for at, message in enumerate(example.messages) if message.role == "assistant"]
        self.prompts = {at: self.render(self.messages[:at], prompt=True) for at in self.turns}

    def render(self, messages: Messages, prompt: bool = False) -> str:
        return self.template.render(messages, prompt=prompt, tools=self.tools)

    def rendering(self) -> Rendering:
        spans = self.tagged() if len(self.blocks) == len(self.turns) else self.proved()
        spans += self.weighted()
        as_prompted = all(self.full.startswith(prompt) for prompt in self.prompts.values())
        return Rendering(
            self.full, self.shadow, tuple(sorted(spans, key=lambda span: span.start)), as_prompted
        )

    def tagged(self) -> list[Span]:
        """The template's own {% generation %} blocks, one for each assistant turn."""
        spans: list[Span] = []
        for at, (start, stop) in zip(self.turns, self.blocks, strict=True):
            stop, closed = self.close(at, start, stop) or (stop, False)
            spans.append(Span(start, stop, at, True, closed, spans[-1].stop if spans else 0))
        return spans

    def proved(self) -> list[Span]:
        """Spans by prompts and marks."""
        visible = [at for at in self.turns if self.messages[at]["content"].strip()]
        ends = self.locate([(at, True) for at in visible])  # a mark would make emptiness text
        spans: list[Span] = []
        for at in self.turns:
            stop = ends.get((at, True))
            opened, start = self.start(at, stop)
            if opened is None:
                opened = spans[-1].stop if spans else 0
            end = None if start is None else self.close(at, start, stop)
            if start is None or end is None:
                raise HiddenTurnError(at, Rendering(self.full, self.shadow))
            spans.append(Span(start, end[0], at, True, end[1], opened or 0))
        return spans

    def start(self, at: int, content: int | None) -> tuple[int | None, int | None]:
        """Where a turn's rendering begins, if its prompt tells, and where what it teaches starts.

        `content` is where its visible content ends.
        """
        prompt = self.prompts[at]
        latest = len(self.full) if content is None else content
        if self.full.startswith(prompt) and len(prompt) <= latest:
            return len(prompt), len(prompt)
        parting = self.parting(at)
        if parting is not None and parting > latest:
            parting = None
        said = self.locate([(at, False)]).get((at, False))
        thought = any(self.messages[at].get(name) for name in THINKING)  # it may stand before the content
        return parting, parting if said is None or (thought and parting is not None) else said

    def parting(self, at: int) -> int | None:
        """Where the rendering leaves a turn's prompt, after its role; None if it is before that."""
        before = self.whole(at)
        if before is None:
            return None
        pairs = enumerate(zip(self.prompts[at], self.full, strict=False))
        shorter = min(len(self.prompts[at]), len(self.full))
        common = next((place for place, (asked, said) in pairs if asked != said), shorter)
        while common > before and not BORDER.match(self.full[common - 1]):
            common -= 1  # `<think>` and `<tool_call>` begin alike
        return common if common > before else None

    def whole(self, count: int) -> int | None:
        """How much of the rendering the first `count` messages are, if they are its beginning."""
        try:
            text = self.render(self.messages[:count])
        except RowError:  # a conversation that may not end here
            return None
        return len(text) if text and self.full.startswith(text) else None

    def weighted(self) -> list[Span]:
        """The contents of others that have a weight of their own."""
        others = [
            at
            for at, message in enumerate(self.example.messages)
            if message.role != "assistant" and message.weight is not None
        ]
        found = self.locate([(at, edge) for at in others for edge in (False, True)]) if others else {}
        for at in others:
            if (at, False) not in found or (at, True) not in found:
                raise RowError(f"messages[{at}]", "has a weight, but the chat template rewrites its text")
        return [Span(found[at, False], found[at, True], at, turn=False) for at in others]

    def close(self, at: int, start: int, content: int | None) -> tuple[int, bool] | None:
        """Where the turn that starts at `start` stops, and whether it is with the end-of-turn token's text.

        `content` is where its visible content ends, if it has any that the template leaves as it is. None
        where the end cannot be told.
        """
        end = self.template.end_text
        calls = content is None or "tool_calls" in self.messages[at]
        behind = start if content is None else content
        if end is not None and not calls:
            said = self.shadow[start:behind].rstrip()
            if said.endswith(end):  # of its own; a {% generation %} block may hold a line break behind it
                return start + len(said), True
            found = self.shadow.find(end, behind)
            if found >= 0 and not self.shadow[behind:found].strip():
                return found + len(end), True
        limit, exact = self.limit(at)
        found = -1 if end is None else self.shadow.find(end, behind, limit)
        if end is not None and found >= 0:
            return found + len(end), True
        if calls:
            return (limit, False) if exact else None
        return behind, False

    def limit(self, at: int) -> tuple[int, bool]:
        """A place before which the turn's text ends, as near as can be told, and whether it is the end."""
        if at == len(self.messages) - 1:
            return len(self.full), True
        if whole := self.whole(at + 1):
            return whole, True
        following = [(at + 1, False)] if self.messages[at + 1]["content"].strip() else []
        for place in self.locate(following).values():
            return place, False
        prompt = next((self.prompts[turn] for turn in self.turns if turn > at), "")
        return (len(prompt), False) if prompt and self.full.startswith(prompt) else (0, False)

    def locate(self, marks: list[tuple[int, bool]]) -> dict[tuple[int, bool], int]:
        """Where the visible content of messages starts (False) and ends (True) in the rendering.

        Renders once with a mark at each place; a mark that the template drops or repeats is left out, and
        so is everything if the rest does not equal the rendering.
        """
        said = "".join(message["content"] for message in self.messages)
        free = [pair for pair in MARKS if pair[0] not in self.full and pair[0] not in said]
        if not free or not marks:
            return {}
        left, right = free[0]
        marked = [dict(message) for message in self.messages]
        for number, (at, is_end) in reversed(list(enumerate(marks))):
            content = marked[at]["content"]
            bare = content.rstrip() if is_end else content.lstrip()
            cut = len(bare) if is_end else len(content) - len(bare)
            marked[at]["content"] = f"{content[:cut]}{left}{number}{right}{content[cut:]}"
        text = self.render(marked)
        pattern = re.compile(f"{left}(\\d+){right}")
        if pattern.sub("", text) != self.full:
            return {}
        found: dict[tuple[int, bool], int] = {}
        removed = 0
        repeated = set()
        for match in pattern.finditer(text):
            mark = marks[int(match[1])]
            repeated |= {mark} & found.keys()
            found[mark] = match.start() - removed
            removed += len(match[0])
        return {mark: place for mark, place in found.items() if mark not in repeated}
