"""Base beside tuned on every held-out source: what both `train` and `evaluate` print and write at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_trainer.checkpoint.disk import write_json
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData
from qlora_trainer.evaluate import report
from qlora_trainer.evaluate.generate import Sampling
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.score import score_base_and_tuned
from qlora_trainer.inference.stop import pad_id
from qlora_trainer.model.forward import Forward

FILE = "evaluation.json"


def compare(
    config: RunConfig,
    folder: Path,
    model: PeftModel,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    held_out: Sequence[TokenizedData],
) -> str:
    """Prints a table a source and writes `evaluation.json`; returns the tables as Markdown."""
    wanted = config.evaluate
    sampling = Sampling(max_new_tokens=wanted.max_new_tokens, batch_size=wanted.batch_size)
    results: dict[str, Any] = {}
    tables = []
    for part in held_out:
        name = ", ".join(part.sources)
        rows = HeldOut.of(
            part,
            tokenizer,
            pad_id(tokenizer, list(stops)),
            task=wanted.task,
            max_rows=wanted.max_rows,
            batch_size=wanted.batch_size,
        )
        base, tuned = score_base_and_tuned(model, forward, rows, tokenizer, stops, sampling)
        report.show(report.comparison(base, tuned, wanted.examples, title=f"held-out rows: {name}"))
        results[name] = {
            "base": base.as_dict(),
            "tuned": tuned.as_dict(),
            "examples": report.examples(base, tuned, wanted.examples),
        }
        tables.append(f"On {name}:\n\n{report.markdown(base, tuned)}")
    write_json(folder / FILE, results)
    return "\n\n".join(tables)
