"""What is printed is shown and never obeyed: no markup, no emoji codes, no control characters, no secret."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_trainer.system.redact import MASK
from qlora_trainer.system.terminal import console, one_line, printable, results

PACKAGE = Path(__file__).parents[2] / "qlora_trainer"
HOSTILE = "a[red]b[/]c :fire: \x1b]0;title\x07 \x1b[2J \x9b31m \u202egpj.exe \r \x08"
SHOWN = r"a[red]b[/]c :fire: \x1b]0;title\x07 \x1b[2J \x9b31m \u202egpj.exe \r \x08"


def test_names_reach_the_terminal_as_they_are_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    table = Table(title=HOSTILE, title_justify="left")
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for renderable in (HOSTILE, table, Panel(HOSTILE, title=Text(HOSTILE))):
        console.print(renderable, soft_wrap=True)
        results.print(renderable, soft_wrap=True)
    printed = capsys.readouterr()
    assert printed.out == printed.err and printed.out.count(SHOWN) == 1 + 3 + 1
    assert printed.out.count("a[red]b[/]c :fire:") == 1 + 3 + 2  # Text drops some control characters itself
    assert not set(printed.out) & set("\x1b\x07\x9b\u202e\r\x08")


def test_a_secret_is_masked_before_its_line_is_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary" + "0123456789" * 5
    monkeypatch.setenv("MY_TOKEN", canary)
    table = Table("where", width=30)
    table.add_row(f"/data/{canary}/rows")
    results.print(table)
    printed = capsys.readouterr().out
    assert MASK in printed and "canary" not in printed


def test_lines_and_tabs_stay_and_one_line_is_one() -> None:
    assert printable("a\n\tb ü 语 🙂 שלום") == "a\n\tb ü 语 🙂 שלום"
    assert one_line("a\n error: forged\x1b[1m") == r"a error: forged\x1b[1m"


def markup_in(source: str) -> list[str]:
    """Strings that look like rich's markup, and consoles of one's own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if any(f"[{style}" in text for style in STYLES):
                found.append(text)
            case ast.Call(func=ast.Name(id="Console")):
                found.append("Console()")
    return found


STYLES = ("/]", "dim]", "bold]", "red]", "green]", "yellow]", "/dim]", "/red]", "/bold]")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_no_room_prints_markup_or_past_the_terminal(file: Path) -> None:
    if file.name != "console.py":  # its progress bar's own column
        assert markup_in(file.read_text(encoding="utf-8")) == []


def test_the_ban_on_markup_catches() -> None:
    assert markup_in("print(f'[yellow]{name}')") and markup_in("Console()") and not markup_in("x['red']")
