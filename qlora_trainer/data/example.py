"""What one row teaches: a checked conversation, or a text with its prompt.

Every format is read into these (`formats.py`); templates (`chat.py`) and masks (`encode.py`) start from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss on it: None takes the run's own choice for the role.

    `extra` goes to the chat template as it is: `tool_calls`, `name`, `reasoning_content`, and for
    alpaca rows `input`, which the Alpaca template puts under its own heading.
    """

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] | None = None

    def for_template(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True)
class Example:
    """What one row teaches: a conversation (`messages`), or `prompt` + `completion` as they stand."""

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
        """Whether there is no answer text to learn."""
        if self.raw:
            return not self.completion.strip()
        return not any(m.role == "assistant" and (m.content.strip() or m.extra) for m in self.messages)
