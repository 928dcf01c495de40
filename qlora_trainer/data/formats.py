"""Rows to examples: the formats that people keep instruction data in, read into one shape.

Comes in: a row's columns. Goes out: an `Example`, a checked conversation or a raw text with its prompt.
A row that does not fit its format raises `RowError(field, problem)`; who reads the rows adds `file:line`.

    alpaca             instruction, output (input, system, history optional)
    messages           messages: [{role, content}]   (OpenAI; content may be a list of text parts)
    sharegpt           conversations: [{from, value}]
    prompt_completion  prompt, completion: texts, or lists of messages (also: input, output)
    text               text: one document, every token supervised
    oasst              a message tree, or its messages a row each (`trees.py`); the best-ranked reply at each
                       level, the QLoRA paper's choice
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import MAX_ROW_BYTES, RowError, kind
from qlora_trainer.errors import DataError

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
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


Reader = Callable[[dict[str, Any]], Example]


def detect(row: dict[str, Any], where: str) -> str:
    """The format of a source, from the columns of its first good row (after mapping).

    Raises DataError for preference pairs, and where no format fits (it says how to map columns).
    """
    columns = set(row)
    refuse_preference(row, where)
    if isinstance(row.get("messages"), list):
        return "messages"
    for name in ("conversations", "conversation"):
        if isinstance(turns := row.get(name), list):
            openai = bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
            return "messages" if openai else "sharegpt"
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        return "oasst"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns or {"input", "output"} <= columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    raise DataError(
        f"{where}: no known format has the columns {', '.join(map(str, row)) or '(none)'}; name them, "
        "for example data.columns={instruction: question, output: answer}, or set data.format"
    )


def refuse_preference(row: dict[str, Any], where: str) -> None:
    """Preference data teaches which answer is better; supervised tuning would teach the worse one too."""
    if {"chosen", "rejected"} <= set(row) or isinstance(row.get("label"), bool):
        raise DataError(
            f"{where}: preference data (chosen/rejected, or a true/false label) is for DPO or KTO, which "
            "this tool does not do; keep the preferred answers and give them as messages"
        )


def reader(format: str, columns: Mapping[str, str]) -> Reader:
    """The function that turns a row into an Example, with the recipe's column names applied."""
    read = READERS[format]
    if not columns:
        return read

    def mapped(row: dict[str, Any]) -> Example:
        return read(rename(row, columns))

    return mapped


def rename(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; other columns keep theirs. RowError names the file's own column."""
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise RowError(missing[0], f"missing column; the row has {', '.join(map(str, row))}")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def _text(row: Mapping[str, Any], field: str, default: str | None = None, at: str = "") -> str:
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


def _clean(text: str, field: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                field, f"half of a surrogate pair at character {error.start}, not valid text"
            ) from error
    if len(text) > MAX_ROW_BYTES:
        raise RowError(field, f"longer than {MAX_ROW_BYTES >> 20} MiB")
    if "\0" in text:
        raise RowError(field, f"NUL character at {text.index(chr(0))}")
    return text


def _alpaca(row: dict[str, Any]) -> Example:
    instruction, extra = _text(row, "instruction"), _text(row, "input", "")
    output = _text(row, "output")
    if not (instruction.strip() or extra.strip()):
        raise RowError("instruction", "empty, and so is input")
    messages = []
    if system := _text(row, "system", ""):
        messages.append(Message("system", system))
    for at, pair in enumerate(_list(row.get("history") or [], "history")):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        ):
            raise RowError(f"history[{at}]", "expected [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra
    parts = {"instruction": instruction, "input": extra} if instruction and extra else None
    messages += [Message("user", question, extra=parts), Message("assistant", output)]
    return Example(tuple(messages))


def _messages(row: dict[str, Any]) -> Example:
    for field in ("messages", "conversations", "conversation"):
        if field in row:
            break
    else:
        raise RowError("messages", f"missing column; the row has {', '.join(map(str, row))}")
    turns = [
        _turn(turn, f"{field}[{at}]", "role", "content") for at, turn in enumerate(_list(row[field], field))
    ]
    return _conversation(turns, field, row)


def _sharegpt(row: dict[str, Any]) -> Example:
    field = "conversations" if "conversations" in row or "conversation" not in row else "conversation"
    if field not in row:
        raise RowError(field, f"missing column; the row has {', '.join(map(str, row))}")
    turns = [
        _turn(turn, f"{field}[{at}]", "from", "value") for at, turn in enumerate(_list(row[field], field))
    ]
    return _conversation(turns, field, row)


def _conversation(turns: list[Message], field: str, row: dict[str, Any]) -> Example:
    if (system := _text(row, "system", "")) and not (turns and turns[0].role == "system"):
        turns = [Message("system", system), *turns]
    check_turns(turns, field)
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools", "expected a list of objects")
    return Example(tuple(turns), tools=tools)


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(field, f"expected a list, found {kind(value)}")
    return value


def _turn(turn: Any, at: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(at, f"expected an object, found {kind(turn)}")
    said = _text(turn, role_key, at=f"{at}.")
    if (role := ROLES.get(said.strip().lower())) is None:
        raise RowError(f"{at}.{role_key}", f"unknown role {said!r}; known: {', '.join(ROLES)}")
    extra = {
        name: turn[name]
        for name in ("name", "tool_calls", "tool_call_id", "reasoning_content")
        if turn.get(name)
    }
    content = turn.get(content_key)
    if isinstance(content, list):
        text = _join_parts(content, f"{at}.{content_key}")
    elif content is None and content_key in turn and "tool_calls" in extra:
        text = ""
    else:
        text = _text(turn, content_key, at=f"{at}.")
    return Message(role, text, _weight(turn, at), extra or None)


def _join_parts(parts: list[Any], at: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise RowError(f"{at}[{index}]", f"only text can be trained on, found {what!r}")
        texts.append(_text(part, "text" if "text" in part else "value", at=f"{at}[{index}]."))
    return "".join(texts)


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


def check_turns(turns: list[Message], field: str) -> None:
    """One optional system turn, then user and assistant in alternation, an assistant last.

    Tool turns follow the assistant turn that called them, and an assistant turn follows them.
    """
    if not turns:
        raise RowError(field, "empty conversation")
    before = ""
    for at, turn in enumerate(turns):
        allowed = {
            "": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }[before]
        if turn.role not in allowed:
            after = f"after {before}" if before else "first"
            raise RowError(f"{field}[{at}]", f"{turn.role} turn {after}; expected {' or '.join(allowed)}")
        before = turn.role
    if before != "assistant":
        raise RowError(
            f"{field}[{len(turns) - 1}]", f"the conversation ends with a {before} turn; nothing answers it"
        )


def _prompt_completion(row: dict[str, Any]) -> Example:
    asks, answers = ("prompt", "completion") if "prompt" in row or "input" not in row else ("input", "output")
    if isinstance(row.get(asks), list) or isinstance(row.get(answers), list):
        turns = [
            _turn(turn, f"{name}[{at}]", "role", "content")
            for name in (asks, answers)
            for at, turn in enumerate(_list(row.get(name), name))
        ]
        check_turns(turns, asks)
        prompt_only = len(row[asks])
        muted = [
            Message(m.role, m.content, 0.0 if at < prompt_only and m.weight is None else m.weight, m.extra)
            for at, m in enumerate(turns)
        ]
        return Example(tuple(muted))
    return Example(prompt=_text(row, asks), completion=_text(row, answers))


def _plain(row: dict[str, Any]) -> Example:
    return Example(completion=_text(row, "text"))


def _oasst(row: dict[str, Any]) -> Example:
    """The best-ranked path of a tree (rank 0 is best; unranked replies come last, first come first)."""
    node = row.get("prompt")
    if not isinstance(node, dict):
        raise RowError("prompt", f"expected the root message of a tree, found {kind(node)}")
    turns: list[Message] = []
    at = "prompt"
    while node is not None:
        said = _text(node, "role", at=f"{at}.")
        if said not in ("prompter", "assistant"):
            raise RowError(f"{at}.role", f"unknown role {said!r}; expected prompter or assistant")
        turns.append(Message(ROLES[said], _text(node, "text", at=f"{at}.")))
        replies = _list(node.get("replies") or [], f"{at}.replies")
        if any(not isinstance(reply, dict) for reply in replies):
            raise RowError(f"{at}.replies", "expected objects")
        replies = [reply for reply in replies if not reply.get("deleted")]
        node = min(replies, key=lambda reply: _rank(reply), default=None)
        at += ".replies[]"
    if turns[-1].role == "user":
        turns.pop()
    check_turns(turns, "prompt")
    return Example(tuple(turns))


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


READERS: dict[str, Reader] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "text": _plain,
    "oasst": _oasst,
}
