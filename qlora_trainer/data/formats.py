"""Rows to examples: the formats that people keep instruction data in, read into one shape.

Comes in: a row's columns. Goes out: an `Example`, a checked conversation or a raw text with its prompt.
A row that does not fit its format raises `RowError(field, problem)`; who reads the rows adds `file:line`.

    alpaca             instruction, output (input, system, history optional)
    messages           messages: [{role, content, tool_calls}], tools   (content may be a list of text parts)
    sharegpt           conversations: [{from, value}], tools, system   (function_call turns are calls)
    prompt_completion  prompt, completion: texts, or lists of messages (also: input, output)
    text               text: one document, every token supervised
    oasst              a message tree, or its messages a row each (`trees.py`); the best-ranked reply at each
                       level, the QLoRA paper's choice

A list may be JSON text: `messages`, `conversations`, `tools`, the arguments of a call (`tools.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qlora_trainer.data.example import Example, Message
from qlora_trainer.data.problems import RowError, kind
from qlora_trainer.data.tools import schemas
from qlora_trainer.data.turns import ROLES, check_order, clean_tree, listed, text, turns
from qlora_trainer.errors import DataError

Reader = Callable[[dict[str, Any]], Example]


def detect(row: dict[str, Any], where: str) -> str:
    """The format of a source, from the columns of its first good row (after mapping).

    Raises DataError for preference pairs, and where no format fits (it says how to map columns).
    """
    refuse_preference(row, where)
    if (format := known(row)) is None:
        raise DataError(
            f"{where}: no known format has the columns {', '.join(map(str, row)) or '(none)'}; name them, "
            "for example data.columns={instruction: question, output: answer}, or set data.format"
        )
    return format


def known(row: Mapping[str, Any]) -> str | None:
    """The format that has a row's columns, if one has."""
    if _is_list(row.get("messages")):
        return "messages"
    for name in ("conversations", "conversation"):
        if _is_list(given := row.get(name)):
            try:
                first = next(iter(listed(given, name)), None)
            except RowError:  # not JSON: reading will say so
                first = None
            return "messages" if isinstance(first, dict) and "role" in first else "sharegpt"
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        return "oasst"
    if {"instruction", "output"} <= set(row):
        return "alpaca"
    if {"prompt", "completion"} <= set(row) or {"input", "output"} <= set(row):
        return "prompt_completion"
    return "text" if "text" in row else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


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
    return lambda row: read(named(row, columns))


def named(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names, and null for NaN, which is pandas' word for it."""
    if any(value != value for value in row.values() if isinstance(value, float)):
        row = {
            name: None if isinstance(value, float) and value != value else value
            for name, value in row.items()
        }
    return rename(row, columns) if columns else row


def rename(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; other columns keep theirs. RowError names the file's own column."""
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise RowError(missing[0], f"missing column; the row has {', '.join(map(str, row))}")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def _alpaca(row: dict[str, Any]) -> Example:
    instruction, extra = text(row, "instruction"), text(row, "input", "")
    output = text(row, "output")
    if not (instruction.strip() or extra.strip()):
        raise RowError("instruction", "empty, and so is input")
    messages = []
    if system := text(row, "system", ""):
        messages.append(Message("system", system))
    for at, pair in enumerate(listed(row.get("history") or [], "history")):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(said, str) for said in pair)
        ):
            raise RowError(f"history[{at}]", "expected [question, answer]")
        clean_tree(list(pair), f"history[{at}]")
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
    return _conversation(turns(row[field], field), field, row)


def _sharegpt(row: dict[str, Any]) -> Example:
    field = "conversations" if "conversations" in row or "conversation" not in row else "conversation"
    if field not in row:
        raise RowError(field, f"missing column; the row has {', '.join(map(str, row))}")
    return _conversation(turns(row[field], field, "from", "value"), field, row)


def _conversation(said: list[Message], field: str, row: dict[str, Any]) -> Example:
    if (system := text(row, "system", "")) and not (said and said[0].role == "system"):
        said = [Message("system", system), *said]
    check_order(said, field)
    return Example(tuple(said), tools=_tools(row))


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    field, given = "tools", row.get("tools")
    if given is None and isinstance(row.get("functions"), list):
        field, given = "functions", row["functions"]  # OpenAI's old name
    found = schemas(given, field)
    return None if found is None else clean_tree(found, field)


def _prompt_completion(row: dict[str, Any]) -> Example:
    asks, answers = ("prompt", "completion") if "prompt" in row or "input" not in row else ("input", "output")
    if isinstance(row.get(asks), list) or isinstance(row.get(answers), list):
        asked = turns(row.get(asks), asks)
        muted = [m if m.weight is not None else replace(m, weight=0.0) for m in asked]
        said = (*muted, *turns(row.get(answers), answers))
        check_order(said, asks)
        return Example(said, tools=_tools(row))
    return Example(prompt=text(row, asks), completion=text(row, answers))


def _plain(row: dict[str, Any]) -> Example:
    return Example(completion=text(row, "text"))


def _oasst(row: dict[str, Any]) -> Example:
    """The best-ranked path of a tree (rank 0 is best; unranked replies come last, first come first)."""
    node = row.get("prompt")
    if not isinstance(node, dict):
        raise RowError("prompt", f"expected the root message of a tree, found {kind(node)}")
    said: list[Message] = []
    at = "prompt"
    while node is not None:
        role = text(node, "role", at=f"{at}.")
        if role not in ("prompter", "assistant"):
            raise RowError(f"{at}.role", f"unknown role {role!r}; expected prompter or assistant")
        said.append(Message(ROLES[role], text(node, "text", at=f"{at}.")))
        replies = listed(node.get("replies") or [], f"{at}.replies")
        if any(not isinstance(reply, dict) for reply in replies):
            raise RowError(f"{at}.replies", "expected objects")
        replies = [reply for reply in replies if not reply.get("deleted")]
        node = min(replies, key=lambda reply: _rank(reply), default=None)
        at += ".replies[]"
    if said[-1].role == "user":
        said.pop()
    check_order(said, "prompt")
    return Example(tuple(said))


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
