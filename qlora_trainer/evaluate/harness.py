"""Tasks of lm-evaluation-harness (EleutherAI), base beside tuned: the field's common yardstick.

In: a model with its adapter, and names of tasks, the library's own or those of a folder of YAML files.
Out: each task's metrics for both. The library renders, scores and aggregates; nothing of it is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.evaluate.perplexity import evaluating
from qlora_trainer.model.residual import base_alone

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "lm_eval.json"
RESAMPLINGS = 1000  # for the standard errors of metrics that have no formula for theirs


class Harness:
    """Tasks that are there, ready to be measured.

    Args:
        tasks: names of tasks, groups or tags.
        folder: of further tasks as YAML, which the library's may include.

    Raises:
        ConfigError: the library knows no such task.
        MissingInputError: the folder is not there.
    """

    def __init__(self, tasks: Sequence[str], folder: str | None = None) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise MissingInputError(f"evaluate.lm_eval_path: no folder {folder}")
        from lm_eval.tasks import TaskManager

        self.tasks = list(tasks)
        self._manager = TaskManager(include_path=folder)
        known = list(self._manager.all_tasks)
        for task in self.tasks:
            if task not in known:
                near = get_close_matches(task, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them"
                raise ConfigError(f"evaluate.lm_eval_tasks: no task is called {task!r}; {hint}")

    def measure(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_rows: int | None
    ) -> dict[str, dict[str, Any]]:
        """task -> {"rows": n, "metrics": {metric: {"base", "tuned", "base_error", "tuned_error"}}}.

        Errors are standard errors; None is what the library cannot tell. At most `max_rows` rows a task.

        Raises:
            MissingInputError: a task's data are neither here nor to be had.
        """
        with evaluating(model):
            with base_alone(model):
                base = self._run(model, tokenizer, batch_size, max_rows)
            tuned = self._run(model, tokenizer, batch_size, max_rows)
        return {
            task: {
                "rows": tuned["n-samples"].get(task, {}).get("effective"),
                "metrics": {
                    name: {
                        "base": _number(base["results"][task].get(key)),
                        "tuned": _number(tuned["results"][task][key]),
                        "base_error": _number(base["results"][task].get(error)),
                        "tuned_error": _number(tuned["results"][task].get(error)),
                    }
                    for name, key, error in _metrics(tuned["results"][task])
                },
            }
            for task in tuned["results"]
        }

    def _run(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_rows: int | None
    ) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found: dict[str, Any] = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.tasks,
                task_manager=self._manager,
                limit=max_rows,
                bootstrap_iters=RESAMPLINGS,
                log_samples=False,
            )
        except OSError as error:
            raise MissingInputError(
                f"evaluate.lm_eval_tasks: the data of {', '.join(self.tasks)} cannot be had: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return found


def table(results: dict[str, dict[str, Any]]) -> Table:
    """What `measure` found, a line a metric."""
    shown = Table(title="lm-evaluation-harness", title_justify="left", title_style="bold")
    for name in ("task", "metric", "base", "tuned", "rows"):
        shown.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, found in results.items():
        for metric, values in found["metrics"].items():
            sides = (_with_error(values[side], values[f"{side}_error"]) for side in ("base", "tuned"))
            shown.add_row(task, metric, *sides, str(found["rows"] or ""))
    return shown


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, key, key of its standard error) of what the library calls `acc,none` and `acc_stderr,none`."""
    for key, value in results.items():
        metric, comma, kept = key.partition(",")
        if comma and not metric.endswith("_stderr") and _number(value) is not None:
            yield metric if kept == "none" else f"{metric} ({kept})", key, f"{metric}_stderr,{kept}"


def _number(value: Any) -> float | None:
    """The library writes "N/A" for what there is not."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
