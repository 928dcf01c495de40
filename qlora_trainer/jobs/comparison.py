"""Base beside tuned on every held-out source: what both `train` and `evaluate` print and write at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData
from qlora_trainer.evaluate import report
from qlora_trainer.evaluate.fullest import LATEST, fullest, read_results
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.score import score_base_and_tuned
from qlora_trainer.export.card import with_measured
from qlora_trainer.export.fingerprint import sha256
from qlora_trainer.inference.generate import Sampling
from qlora_trainer.inference.load import ADAPTER_WEIGHTS
from qlora_trainer.inference.stop import pad_id
from qlora_trainer.model.forward import Forward
from qlora_trainer.system import redact
from qlora_trainer.system.disk import write_json, write_text
from qlora_trainer.system.terminal import to_stderr

FILE = "evaluation.json"
SIZE = ("rows", "questions", "max_new_tokens")  # of a result: how much was measured


def compare(
    config: RunConfig,
    model: PeftModel,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    held_out: Sequence[TokenizedData],
    answers: bool = True,
) -> dict[str, dict[str, Any]]:
    """Prints a table a source; returns source -> `rows`, `questions`, scores and examples.

    answers: whether the task's questions are answered, too, where there is a task.
    """
    wanted = config.evaluate
    sampling = Sampling(max_new_tokens=wanted.max_new_tokens, batch_size=wanted.batch_size)
    found: dict[str, dict[str, Any]] = {}
    for part in held_out:
        name = ", ".join(part.sources)
        rows = HeldOut.of(
            part,
            tokenizer,
            pad_id(tokenizer, list(stops)),
            task=wanted.task if answers else "none",
            max_rows=wanted.max_rows,
            batch_size=wanted.batch_size,
        )
        base, tuned = score_base_and_tuned(model, forward, rows, tokenizer, stops, sampling)
        report.show(report.comparison(base, tuned, wanted.examples, title=f"held-out rows: {name}"))
        found[name] = {
            "rows": min(len(part), wanted.max_rows or len(part)),
            "questions": len(rows.questions),
            "max_new_tokens": wanted.max_new_tokens if rows.questions else 0,
            "base": base.as_dict(),
            "tuned": tuned.as_dict(),
            "examples": report.examples(base, tuned, wanted.examples),
        }
    return found


def record(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what `compare` found to `evaluation.json` and into the card of the run's adapter.

    Of each source the fullest result stands; one of another adapter is no result of this one.
    """
    card = folder / "adapter" / "README.md"
    adapter = sha256(folder / "adapter" / ADAPTER_WEIGHTS)
    earlier = read_results(folder / FILE, to_stderr)
    kept = {name: old for name, old in earlier.items() if _is_of(adapter, old)}
    for source, result in found.items():
        name = redact.text(source)
        kept[name] = fullest(kept.get(name), {"adapter": adapter, **result}, same=("adapter",), size=SIZE)
        if LATEST in kept[name]:
            to_stderr(f"{FILE}: a fuller result on {name} stays, this one is beside it")
    write_json(folder / FILE, kept)
    if card.is_file():
        tables = (
            f"On {name}:\n\n{report.markdown(result['base'], result['tuned'])}"
            for name, result in kept.items()
        )
        write_text(card, with_measured(card.read_text(encoding="utf-8"), "\n\n".join(tables)))


def _is_of(adapter: str, stored: Any) -> bool:
    sound = isinstance(stored, dict) and all(isinstance(stored.get(side), dict) for side in ("base", "tuned"))
    return sound and stored.get("adapter") == adapter
