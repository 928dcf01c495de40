"""One turn of a conversation, and the order of all of them, checked.

Comes in: the objects of a list of turns, whatever names they use for role and text. Goes out: `Message`s.
`RowError` names the field; who reads the rows adds `file:line`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_trainer.data import tools
from qlora_trainer.data.example import SPOKEN, THINKING, Message
from qlora_trainer.data.problems import MAX_ROW_BYTES, RowError, kind

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles of turns whose text is a call of a tool
AFTER: dict[str, tuple[str, ...]] = {  # who may speak after whom; agents speak, and call, several times
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool", "assistant"),
    "tool": ("assistant", "tool", "user"),
}
READ_HERE = {"role", "content", "tool_calls", "function_call", "train", "weight", "loss_weight"}


def turn(value: Any, at: str, role_key: str = "role", content_key: str = "content") -> Message:
    """One turn; every key that is not read here goes on to the template under its own name."""
    if not isinstance(value, dict):
        raise RowError(at, f"expected an object, found {kind(value)}")
    said = text(value, role_key, at=f"{at}.")
    if (role := ROLES.get(said.strip().lower())) is None:
        raise RowError(f"{at}.{role_key}", f"unknown role {said!r}; known: {', '.join(ROLES)}")
    extra = {
        name: clean_tree(item, f"{at}.{name}")
        for name, item in value.items()
        if name not in READ_HERE | {role_key, content_key} and item not in (None, "", [], {})
    }
    content, calls = value.get(content_key), tools.calls(value.get("tool_calls"), f"{at}.tool_calls")
    if said.strip().lower() in CALLS and not calls:
        content, calls = tools.spoken(content, f"{at}.{content_key}")
    elif role == "assistant" and not calls:
        calls = tools.calls(value.get("function_call") or None, f"{at}.function_call")
    if isinstance(content, list):
        content, thought, more = _parts(content, f"{at}.{content_key}")
        calls += more
        extra |= {THINKING[0]: thought} if thought else {}
    if calls:
        extra["tool_calls"] = clean_tree(calls, f"{at}.tool_calls")
    if content is None and role == "assistant" and any(extra.get(name) for name in SPOKEN):
        content = ""  # it need not be there where something else is said
    elif content_key not in value:
        text(value, content_key, at=f"{at}.")  # says what is there instead
    words = text({content_key: content}, content_key, at=f"{at}.")
    return Message(role, words, _weight(value, at), extra or None)


def turns(values: Any, field: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """All turns of a list, which may be JSON text; their order is left to `check_order`."""
    return [
        turn(item, f"{field}[{at}]", role_key, content_key) for at, item in enumerate(listed(values, field))
    ]


def listed(value: Any, field: str) -> list[Any]:
    """A list, or the JSON text of one."""
    if isinstance(given := tools.unpacked(value, field), list):
        return given
    raise RowError(field, f"expected a list, found {kind(given)}")


def text(row: Mapping[str, Any], field: str, default: str | None = None, at: str = "") -> str:
    """A text that can be tokenized; `default` stands for one that is missing or null."""
    if field not in row:
        if default is None:
            raise RowError(at + field, f"missing column; the row has {', '.join(map(str, row)) or 'none'}")
        return default
    value = row[field]
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(at + field, f"expected text, found {kind(value)}")
    return _clean(value, at + field)


def _clean(value: str, field: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                field, f"half of a surrogate pair at character {error.start}, not valid text"
            ) from error
    if len(value) > MAX_ROW_BYTES:
        raise RowError(field, f"longer than {MAX_ROW_BYTES >> 20} MiB")
    if "\0" in value:
        raise RowError(field, f"NUL character at {value.index(chr(0))}")
    return value


def clean_tree(value: Any, field: str) -> Any:
    """`value`, whose every text can be tokenized. Raises RowError."""
    if isinstance(value, str):
        _clean(value, field)
    elif isinstance(value, dict):
        for name, item in value.items():
            clean_tree(name, field)
            clean_tree(item, f"{field}.{name}")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            clean_tree(item, f"{field}[{at}]")
    return value


def _parts(parts: list[Any], at: str) -> tuple[str, str, list[dict[str, Any]]]:
    """What a content of several parts holds: texts, thoughts and calls, each in order."""
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(parts):
        place = f"{at}[{index}]"
        what = part.get("type") if isinstance(part, dict) else kind(part)
        names = (str(what), "text", "value")
        key = next((name for name in names if isinstance(part, dict) and name in part), "value")
        if what == "text":
            texts.append(text(part, key, at=f"{place}."))
        elif what in ("reasoning", "thinking"):
            thoughts.append(text(part, key, at=f"{place}."))
        elif what == "tool_call":
            calls += tools.calls(part.get(key), f"{place}.{key}")
        else:
            raise RowError(place, f"only text can be trained on, found {what!r}")
    return "".join(texts), "".join(thoughts), calls


def _weight(turn: dict[str, Any], at: str) -> float | None:
    """`train: false`, or a weight under one of the names in use."""
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{at}.train", f"expected true or false, found {kind(train)}")
    for name in ("weight", "loss_weight"):
        weight = turn.get(name)
        if weight is None:
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise RowError(f"{at}.{name}", f"expected a number of 0 or more, found {weight!r}")
        return 0.0 if train is False else float(weight)
    return None if train is None else float(train)


def check_order(turns: Sequence[Message], field: str) -> None:
    """One optional system turn, then user and assistant by turns, an assistant last.

    An assistant may say several things in a row, as agents do; its calls are answered by tool turns. Raises
    RowError.
    """
    if not turns:
        raise RowError(field, "empty conversation")
    before = ""
    for at, message in enumerate(turns):
        if message.role not in (allowed := AFTER[before]):
            after = f"after {before}" if before else "first"
            remedy = "; join the two" if message.role == before else ""
            raise RowError(
                f"{field}[{at}]",
                f"{message.role} turn {after}; expected {' or '.join(allowed)}{remedy}",
            )
        before = message.role
    if before != "assistant":
        raise RowError(
            f"{field}[{len(turns) - 1}]", f"the conversation ends with a {before} turn; nothing answers it"
        )
