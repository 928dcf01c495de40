"""The model card: what this folder is, what it learned from, how it measured, how to load it.

In: plain values. Out: Markdown with the metadata header that the hub reads. A card names the base
where it is and everything else by name only: no home folders, no tokens, no environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.system import redact

LONGEST_LICENCE = 1 << 20  # bytes of a licence, and of what is read of a card
_TABLE = ("<!-- measured: begin -->", "<!-- measured: end -->")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: its heading.
        base: hub name, or the folder of the base model.
        revision: of a hub base.
        licence: of the base, as its own card states it (`apache-2.0`), if it does.
        made: one paragraph: what kind of export this is.
        data: names of the data it was trained on.
        settings: key -> value of the recipe, as configured.
        load: Python that loads the folder, with `FOLDER` standing for it.
        tags: for the hub.
        library: for the hub.
    """

    title: str
    base: str
    made: str
    load: str
    revision: str | None = None
    licence: str | None = None
    data: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ("qlora", "lora")
    library: str = "transformers"


def render(card: Card, measured: str = "") -> str:
    """The card as Markdown; `measured` is a Markdown table or empty."""
    head: dict[str, Any] = {
        "library_name": card.library,
        "pipeline_tag": "text-generation",
        "tags": list(card.tags),
    }
    if _is_hub_name(card.base):
        head["base_model"] = card.base
    if card.licence:
        head["license"] = card.licence
    where = f"`{card.base}`" + (f" at revision `{card.revision}`" if card.revision else "")
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {card.title}",
        "",
        card.made,
        "",
        f"Base model: {where}.",
        "",
        "## Load it",
        "",
        "```python",
        card.load.strip(),
        "```",
        "",
        "## Data",
        "",
        *([f"- `{_named(source)}`" for source in card.data] or ["Not recorded."]),
        "",
        "## Measured",
        "",
        *_measured(measured),
        "",
    ]
    if card.settings:
        lines += ["## Settings", "", "```yaml", settings_yaml(card.settings).strip(), "```", ""]
    return "\n".join(lines)


def with_measured(text: str, measured: str) -> str:
    """A rendered card with its measured table replaced; one that somebody wrote anew stays as it is."""
    if any(mark not in text for mark in _TABLE):
        return text
    begin, end = (text.index(mark) for mark in _TABLE)
    return text[:begin] + "\n".join(_measured(measured)) + text[end + len(_TABLE[1]) :]


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML: nulls and empty sections left out, paths cut to their last part, secrets masked."""
    return yaml.safe_dump(redact.tree(_shareable(settings)), sort_keys=False, allow_unicode=True)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, right-aligned."""
    rule = "|".join(["---", *("---:" for _ in columns[1:])])
    return "\n".join([_row(columns), f"|{rule}|", *map(_row, rows)])


def licence_of(base: Path) -> str | None:
    """The `license:` that the base model's own card states, if it lies in `base`."""
    card = base / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(LONGEST_LICENCE)
    found = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
    return found.group(1) if found else None


def licence_files(base: Path) -> list[Path]:
    """Licence texts beside the base model, to travel with what is made from it."""
    wanted = ("license", "licence", "notice", "use_policy", "usage_policy")
    found = (path for path in base.glob("*") if path.name.lower().startswith(wanted) and path.is_file())
    return sorted(path for path in found if path.stat().st_size < LONGEST_LICENCE)


def _measured(table: str) -> list[str]:
    return [_TABLE[0], table.strip() or "Not measured yet.", _TABLE[1]]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shareable(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _shareable(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item != {}}
    if isinstance(value, list | tuple):
        return [_shareable(item) for item in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    """A local path as its last part."""
    return Path(text).name if text.startswith(("/", "~", "./", "../")) else text


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
