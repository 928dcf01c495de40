"""The run's page, `report.html`: one self-contained file made from the run's folder alone.

In: the folder. Out: the page in it, whole or not at all; it can be remade at any time. It opens from disk,
loads nothing, and runs no code but its own. What came from users (rows, names, paths, errors) reaches it as
text: jinja2 escapes every value, the curves are JSON that cannot end its script element, and secrets are
masked when the files are read.

`report_files` reads, `report_series` thins the curves, `report_headline`, `report_setup` and `report_results`
choose what is said; `report_page/` holds template, style and script, and uPlot (MIT), which draws the curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from qlora_trainer import __version__
from qlora_trainer.system.disk import atomic_write
from qlora_trainer.track import report_headline, report_results, report_setup, report_view
from qlora_trainer.track.report_files import RunFiles, read_run
from qlora_trainer.track.report_view import Headline, Section

FILE = "report.html"
# What a document of another version, or one edited by hand, can make of code that reads it.
STRANGE = (TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def write_report(
    folder: Path,
    *,
    defaults: Mapping[str, Any],
    recipe_values: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> Path:
    """Makes the page of the run in `folder` and returns its path.

    Args:
        defaults: of every configuration key, nested as in config.yaml.
        recipe_values: name of a recipe -> dotted key -> value; empty where it is not known.

    Raises:
        CheckpointError: the disk refused it; an earlier page is untouched.
    """
    page = render(read_run(folder), defaults, recipe_values)
    atomic_write(folder / FILE, page.encode(errors="replace"), durable=False)
    return folder / FILE


def render(
    files: RunFiles, defaults: Mapping[str, Any], recipe_values: Callable[[str], Mapping[str, Any]]
) -> str:
    """The page's HTML."""
    problems = list(files.problems)
    if unread := files.series.unread:
        lines = "1 line is no record" if unread == 1 else f"{unread:,} lines are no records"
        problems.append(f"metrics.jsonl: {lines} and left out")

    def configuration(files: RunFiles) -> Section | None:
        recipe = files.config.get("recipe")
        return report_setup.configuration(files, defaults, recipe_values(recipe) if recipe else {})

    builders: list[tuple[str, Callable[[RunFiles], Section | None]]] = [
        ("Starts", report_headline.starts),
        ("Plan", report_setup.planned),
        ("Data", report_setup.data),
        ("Evaluation", report_results.evaluation),
        ("Exports", report_results.exports),
        ("On disk", report_results.checkpoints),
        ("Configuration", configuration),
    ]
    try:
        headline = report_headline.headline(files)
        resumed = report_headline.resumed_at(files.status)
    except STRANGE as error:
        problems.append(_strange("status.json", error))
        headline, resumed = Headline(files.name, "unknown", "warn", ""), []
    sections = []
    for title, build in builders:
        try:
            section = build(files)
        except STRANGE as error:
            problems.append(_strange(title, error))
            continue
        if section is not None:
            sections.append(section)
    return _template().render(
        headline=headline,
        sections=sections,
        chart=files.series.chart(resumed),
        nonfinite=len(files.series.nonfinite),
        problems=problems,
        written=report_view.date(datetime.now(timezone.utc)),
        version=__version__,
    )


def _strange(what: str, error: Exception) -> str:
    return f"{what}: not as this version writes it ({type(error).__name__}: {str(error)[:200]})"


def _template() -> Any:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_asset),
    )
    environment.globals["asset"] = lambda name: Markup(_asset(name))  # ours, not the run's
    environment.tests["of"] = lambda value, name: type(value).__name__ == name
    return environment.get_template("page.html")


def _asset(name: str) -> str:
    return (
        resources.files("qlora_trainer.track")
        .joinpath("report_page")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )
