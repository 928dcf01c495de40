"""What is exported or verified, and the measurement of exports against the model that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData
from qlora_trainer.errors import ConfigError, DivergedError
from qlora_trainer.evaluate.held_out import HeldOut
from qlora_trainer.evaluate.match import Question
from qlora_trainer.export import calibration
from qlora_trainer.export.base import is_quantized
from qlora_trainer.export.record import RESULT, store
from qlora_trainer.export.verify import Sample, Yardstick, markdown, result, table, verify
from qlora_trainer.inference.load import (
    adapter_stops,
    base_defaults,
    check_base,
    find_adapter,
    load_adapter_tokenizer,
    trained_base,
)
from qlora_trainer.inference.records import training_record
from qlora_trainer.inference.stop import pad_id, stop_ids
from qlora_trainer.jobs import page, wiring
from qlora_trainer.jobs.wiring import run_folder
from qlora_trainer.model.load import BaseOptions, load_tokenizer, pick_device, pick_dtype
from qlora_trainer.model.source import resolve
from qlora_trainer.system.disk import write_text
from qlora_trainer.system.terminal import console, results


def verify_exports(config: RunConfig, exports: Mapping[str, Path]) -> None:
    """Prints the table, writes it beside the exports, and fails if one of them did.

    Raises:
        DivergedError: naming each export that failed and why.
    """
    wanted, what = config.export, subject(config)
    yardstick = Yardstick(
        adapter=what.adapter,
        base=what.source,
        trained=what.record | {"stored_quantized": is_quantized(what.source, what.options.revision)},
        stop_ids=what.stop_ids,
        dtype=str(what.options.dtype).removeprefix("torch."),
        device=pick_device(config.model.device).type,
    )
    sample = _sample(config, what.tokenizer, what.stop_ids)
    verdicts = verify(
        yardstick,
        exports,
        sample,
        max_kl=wanted.max_kl,
        max_new_tokens=config.evaluate.max_new_tokens,
        say=lambda name: console.print(f"measuring {name}", style="dim"),
    )
    results.print(table(verdicts, sample))
    root = exports_folder(config)
    if store(root / RESULT, result(verdicts, yardstick, sample, config.evaluate.max_new_tokens)):
        write_text(root / "verify.md", markdown(verdicts, sample) + "\n")
    else:
        console.print(f"{root / RESULT}: an earlier result on more stays, this one is beside it")
    page.refresh(root.parent)
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        said = "; ".join(f"{verdict.name} {verdict.failures[0].text}" for verdict in failed)
        remedies = {f"for {verdict.name}, {verdict.failures[0].remedy}": None for verdict in failed}
        raise DivergedError(f"verify: {said} (see {root / RESULT}); {'; '.join(remedies)}")


@dataclass(frozen=True)
class Subject:
    """What is exported or verified: an adapter on its base, or a base by itself.

    Attributes:
        adapter: None for a base by itself.
        options: how the base is loaded, as recorded when it was trained on.
        source: the base as `from_pretrained` takes it.
        record: what training.json says, or as much of it as is known.
    """

    adapter: Path | None
    options: BaseOptions
    source: str
    record: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def subject(config: RunConfig) -> Subject:
    """The run's adapter; one from elsewhere (`export.adapter`); or, with neither, the model that is named."""
    name, device = config.model.model_name_or_path, config.model.device
    if config.export.adapter is None and config.run is None and config.recipe is None:
        assert name is not None, "checked with the configuration"
        options = BaseOptions(
            name, config.model.revision, "none", dtype=pick_dtype("auto", pick_device(device))
        )
        source = resolve(name, options.revision)
        tokenizer = load_tokenizer(name, options.revision)
        defaults = base_defaults(source, options.revision)
        record = {"method": "none", "revision": options.revision}
        return Subject(None, options, source, record, tokenizer, stop_ids(tokenizer, defaults))
    adapter = find_adapter(config.export.adapter or run_folder(config))
    options = trained_base(adapter, name, device, config.model.revision)
    source = resolve(options.name_or_path, options.revision)
    check_base(adapter, source, options.revision)
    tokenizer = load_adapter_tokenizer(adapter, options)
    return Subject(
        adapter,
        options,
        source,
        training_record(adapter) or {"method": "none", "revision": options.revision},
        tokenizer,
        adapter_stops(adapter, tokenizer, source, options.revision),
    )


def exports_folder(config: RunConfig) -> Path:
    """Where exports lie: in the run's folder, or in `output_dir` for an adapter from elsewhere."""
    return run_folder(config) / "exports"


def _sample(config: RunConfig, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> Sample:
    """Held-out rows; the training rows where nothing was held out; or the text that was named."""
    wanted = config.export
    pad = pad_id(tokenizer, stops)
    questions: list[Question] = []
    if wanted.verify_text is not None:
        parts = [calibration.load_text(wanted.verify_text, tokenizer, config.train.max_length, 512)]
    elif config.data.path is None:
        raise ConfigError(
            "verify: no rows to measure on; name some with export.verify_text=FILE or data.path=FILE"
        )
    else:
        parts = wiring.load_held_out(config, tokenizer)
        if not parts:
            parts = [wiring.load_data(config, tokenizer)]
        share = -(-wanted.verify_questions // len(parts))
        for part in parts:
            if share:
                asked = HeldOut.of(part, tokenizer, pad, task="exact_match", max_rows=share).questions
                questions += asked[: wanted.verify_questions - len(questions)]
    rows = [row for part in parts for row in _rows(part, -(-wanted.verify_rows // len(parts)))]
    names = ", ".join(Path(name).name for part in parts for name in part.sources)
    return Sample(
        rows[: wanted.verify_rows], questions, f"{min(len(rows), wanted.verify_rows)} rows of {names}"
    )


def _rows(data: TokenizedData, limit: int) -> list[tuple[list[int], list[bool]]]:
    documents = (data.document(index) for index in range(min(limit, len(data))))
    return [(document.ids.tolist(), (document.weights > 0).tolist()) for document in documents]
