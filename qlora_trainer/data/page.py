"""A Survey as one self-contained HTML file: the collated batch token by token, the ledger, a search box.

Comes in: surveys by role. Goes out: a page that needs no network and runs no code but its own; the data are
embedded as JSON, and everything that came from a user's file reaches the page as text, never as markup.
"""

from __future__ import annotations

import json
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_trainer.data.screen import facts, warnings
from qlora_trainer.data.survey import BatchRow, Survey
from qlora_trainer.system import redact
from qlora_trainer.system.disk import atomic_write, disk_errors

LEDGER_ROWS = 10_000  # shown in the page; the rest are counted


def write_page(surveys: dict[str, Survey], title: str, path: Path) -> None:
    """Write the page, whole or not at all."""
    embedded = json.dumps(
        redact.tree({"title": title, "roles": {role: _role(survey) for role, survey in surveys.items()}}),
        ensure_ascii=False,
        separators=(",", ":"),
    ).replace("<", "\\u003c")  # nothing in the data can end the script element
    page = resources.files("qlora_trainer.data").joinpath("page.html").read_text(encoding="utf-8")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page.replace("__DATA__", embedded, 1).encode(errors="replace"), durable=False)


def _role(survey: Survey) -> dict[str, Any]:
    return {
        "facts": list(facts(survey).items()),
        "warnings": warnings(survey),
        "histogram": survey.histogram,
        "maxLength": survey.max_length,
        "dropped": sum(survey.ledger.dropped.values()),
        "ledger": [list(row) for row in islice(survey.ledger.rows(), LEDGER_ROWS)],
        "rows": [_row(row) for row in survey.batch],
        "rowsInStep": survey.batch_total,
    }


def _row(row: BatchRow) -> dict[str, Any]:
    return {
        "padding": row.padding,
        "documents": [
            {
                "where": document.where,
                # text, id, position, weight, special
                "tokens": [
                    [t.text, t.id, t.position, round(t.weight, 6), int(t.special)] for t in document.tokens
                ],
            }
            for document in row.documents
        ],
    }
