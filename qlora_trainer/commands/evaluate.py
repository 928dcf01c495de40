"""Measure a finished run on its held-out rows: base beside tuned, and a few answers of each."""

from __future__ import annotations

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import DataError
from qlora_trainer.evaluate.fullest import fullest, read_results
from qlora_trainer.evaluate.harness import FILE, Harness, table
from qlora_trainer.export.fingerprint import sha256
from qlora_trainer.inference.load import ADAPTER_WEIGHTS, find_adapter, load
from qlora_trainer.jobs import page, wiring
from qlora_trainer.jobs.comparison import compare, record
from qlora_trainer.jobs.fit import check_fit
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.limits import limits_of
from qlora_trainer.system.disk import write_json
from qlora_trainer.system.terminal import console, results, to_stderr


def run(config: RunConfig) -> None:
    """Prints the comparison and writes it to evaluation.json (and lm_eval.json) in the run's folder."""
    folder = wiring.run_folder(config)
    adapter_folder = find_adapter(folder)  # before anything heavy
    wanted = config.evaluate
    harness = Harness(wanted.lm_eval_tasks, wanted.lm_eval_path) if wanted.lm_eval_tasks else None
    model = config.model
    loaded = load(
        folder,
        base=model.model_name_or_path,
        device=model.device,
        cache_quantized=model.cache_quantized,
        revision=model.revision,
    )
    held_out = wiring.load_held_out(config, loaded.tokenizer)
    if held_out:
        remarks = [line for part in held_out for line in part.ledger.remarks]
        for line in [*remarks, *check_fit(limits_of(loaded.model), held_out, loaded.tokenizer)]:
            console.print(line, style="yellow")
        forward = ReferenceForward(loaded.model)
        record(folder, compare(config, loaded.model, forward, loaded.tokenizer, loaded.stop_ids, held_out))
    elif harness is None:
        raise DataError(f"{folder}: nothing is held out; set data.eval_path=FILE or data.eval_fraction=0.1")
    if harness is not None:
        found = harness.measure(
            loaded.model, loaded.tokenizer, batch_size=wanted.batch_size, max_rows=wanted.max_rows
        )
        results.print(table(found))
        adapter = sha256(adapter_folder / ADAPTER_WEIGHTS)
        earlier = read_results(folder / FILE, to_stderr).items()
        kept = {task: old for task, old in earlier if isinstance(old, dict) and old.get("adapter") == adapter}
        for task, result in found.items():
            measured = {"adapter": adapter, "limit": wanted.max_rows, **result}
            kept[task] = fullest(kept.get(task), measured, same=("adapter",), size=("limit", "rows"))
        write_json(folder / FILE, kept)
    page.refresh(folder)
