"""What one row teaches: a checked conversation, or a text with its prompt.

Every format is read into these (`formats.py`); templates (`chat.py`) and masks (`encode.py`) start from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THINKING = ("reasoning_content", "reasoning", "thinking")  # what people call what the model thinks
SPOKEN = ("tool_calls", *THINKING)  # keys beside `content` that hold what an assistant says


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss on it: None takes the run's own choice for the role.

    `extra` holds every other key of the turn under the name that the data give it: `name`, `tool_call_id`,
    a key of THINKING, keys of a template of one's own. Empty ones (null, "", [], {}) are left out.
    `tool_calls` are as `tools.py` describes them. Alpaca rows have `instruction` and `input`, which the
    Alpaca template puts under headings of their own; their text stands in `content` too.
    """

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def says(self) -> bool:
        """Whether there is anything to learn in it: text, a call of a tool, a thought."""
        return bool(self.content.strip()) or any((self.extra or {}).get(name) for name in SPOKEN)

    def for_template(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True)
class Example:
    """What one row teaches: a conversation (`messages`), or `prompt` + `completion` as they stand.

    `tools` are the schemas that the conversation may call, as `tools.py` describes them.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: list[dict[str, Any]] | None = None

    @property
    def raw(self) -> bool:
        """Whether no chat template applies."""
        return not self.messages

    @property
    def empty(self) -> bool:
        """Whether there is no answer to learn."""
        if self.raw:
            return not self.completion.strip()
        return not any(message.role == "assistant" and message.says for message in self.messages)
