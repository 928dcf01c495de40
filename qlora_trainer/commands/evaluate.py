"""Measure a finished run on its held-out rows: base beside tuned, and a few answers of each."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_trainer.checkpoint.disk import atomic_write
from qlora_trainer.commands import wiring
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData
from qlora_trainer.errors import DataError
from qlora_trainer.evaluate.generate import Sampling
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.report import comparison, show
from qlora_trainer.evaluate.score import score_base_and_tuned
from qlora_trainer.inference.load import Loaded, find_adapter, load
from qlora_trainer.inference.stop import pad_id
from qlora_trainer.model.forward import ReferenceForward


def run(config: RunConfig) -> None:
    """Prints the comparison and writes it to evaluation.json in the run's folder."""
    folder = run_folder(config)
    find_adapter(folder)  # before anything heavy
    loaded = load(folder, device=config.model.device)
    wanted = config.evaluate
    rows = HeldOut.of(
        eval_data(config, loaded),
        loaded.tokenizer,
        pad_id(loaded.tokenizer, loaded.stop_ids),
        task=wanted.task,
        max_rows=wanted.max_rows,
        batch_size=wanted.batch_size,
    )
    base, tuned = score_base_and_tuned(
        loaded.model,
        ReferenceForward(loaded.model),
        rows,
        loaded.tokenizer,
        loaded.stop_ids,
        Sampling(max_new_tokens=wanted.max_new_tokens, batch_size=wanted.batch_size),
    )
    found = {"base": base.as_dict(), "tuned": tuned.as_dict()}
    atomic_write(folder / "evaluation.json", json.dumps(found, indent=2).encode() + b"\n")
    show(comparison(base, tuned, wanted.examples))


def run_folder(config: RunConfig) -> Path:
    """The finished run that a command is about: `run=…`, or where the recipe puts its run."""
    folder = config.run or config.output_dir
    assert folder is not None, "checked with the configuration"
    return Path(folder)


def eval_data(config: RunConfig, loaded: Loaded) -> TokenizedData:
    """The run's held-out rows, rendered with the template that travels with its tokenizer.

    Raises:
        DataError: the run holds nothing out.
    """
    data = wiring.load_data(config, loaded.tokenizer, "eval")
    if data is None:
        raise DataError(
            f"{run_folder(config)}: nothing is held out; set data.eval_path=FILE or data.eval_fraction=0.1"
        )
    return data
