"""OASST messages, one a row, joined into the trees they are parts of.

The hub's `OpenAssistant/oasst1` keeps each message as a row with `parent_id`, tree after tree. Comes in: any
rows. Goes out: the same rows, but consecutive messages of one tree as one row in the form of OASST's tree
files, at the line of its first message.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from qlora_trainer.data.problems import Problem
from qlora_trainer.data.rows import Row

COLUMNS = {"message_id", "parent_id", "message_tree_id", "text", "role"}


def join_trees(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows with trees joined; rows that are not OASST messages pass as they are."""
    for tree, members in groupby(rows, _tree):
        if tree is None:
            yield from members
        else:
            yield _join(list(members))


def _tree(row: Row) -> tuple[str, Any] | None:
    if isinstance(row.value, dict) and row.value.keys() >= COLUMNS:
        return row.file, row.value["message_tree_id"]
    return None


def _join(rows: list[Row]) -> Row:
    first = rows[0]
    nodes: dict[Any, dict[str, Any]] = {}
    for row in rows:
        assert isinstance(row.value, dict)
        nodes[row.value["message_id"]] = {**row.value, "replies": []}
    root = None
    for node in nodes.values():
        if node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
        elif root is None and node["parent_id"] is None:
            root = node
        else:
            lost = f"{node['parent_id']!r} is not a message of this tree"
            return first._replace(value=Problem("parent_id", lost))
    if root is None:
        return first._replace(value=Problem("parent_id", "the tree's messages form a circle"))
    return first._replace(value={"message_tree_id": root["message_tree_id"], "prompt": root})
