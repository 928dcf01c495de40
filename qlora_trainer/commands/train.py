"""Fine-tune: data, base model, adapters, the loop, evaluation, and the adapter at the end."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from qlora_trainer.checkpoint import publish, resume
from qlora_trainer.config import claim
from qlora_trainer.config.frozen import as_dict
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import Batch, Loader
from qlora_trainer.errors import PreemptedError, explained
from qlora_trainer.evaluate.perplexity import LossSum, evaluating, measure_loss
from qlora_trainer.export.adapter import TrainedOn, export_adapter
from qlora_trainer.inference.stop import stop_ids
from qlora_trainer.jobs import comparison, page, wiring
from qlora_trainer.jobs.accept import accept, check, learning_rate
from qlora_trainer.jobs.planning import check_model, remedies, settled
from qlora_trainer.jobs.training import (
    Run,
    base_print,
    concerns,
    describe_data,
    describe_training,
    facts_of_data,
    facts_of_start,
    load_model,
    make_forward,
    memory_used,
    plan_run,
)
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import GraphedMicroStep
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.model.load import load_tokenizer, pick_device
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim import make_optimizer
from qlora_trainer.plan.plan import RunPlan
from qlora_trainer.system import disk, redact
from qlora_trainer.system.processes import follow_launcher
from qlora_trainer.system.terminal import console
from qlora_trainer.track import Tracker, closing
from qlora_trainer.track.console import ConsoleTracker
from qlora_trainer.track.jsonl import BAD, JsonlTracker
from qlora_trainer.track.report import FILE as REPORT
from qlora_trainer.track.wandb import WandbTracker
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.health import MemoryGuard
from qlora_trainer.train.job import Job, MicroStep, Progress, count_steps
from qlora_trainer.train.loop import train
from qlora_trainer.train.rehearsal import rehearse, widest
from qlora_trainer.train.signals import Status, StopSignals
from qlora_trainer.train.state import RunState

EVALUATED_AT_ONCE = 8  # batches between two looks at whether the run has to stop


def run(config: RunConfig) -> None:
    """Trains to the end, or resumes what an earlier call began; prints what was learned and what is next.

    A start that is refused leaves the run that is in the folder as it was.
    """
    follow_launcher()
    assert config.output_dir is not None, "checked with the configuration"
    folder = Path(config.output_dir)
    status = Status()
    code, message = 70, "a bug: see what was printed"
    with ExitStack() as cleanup:
        signals = cleanup.enter_context(StopSignals(status))
        ranks = Ranks(pick_device(config.model.device))
        cleanup.callback(ranks.close)
        run = Run(config, folder, ranks, signals, status, claim.configuration(config))
        if ranks.main:
            cleanup.enter_context(disk.lock(folder))
            claim.refuse(config)  # again: the folder may have changed before it was locked
            status.note(**facts_of_start(ranks))
            if not claim.holds_a_run(folder):
                run.accept()
        ranks.wait()
        try:
            _train(run)
            code, message = 0, ""
        except Exception as error:
            code, message = explained(error).exit_code, str(explained(error))
            raise
        finally:
            signals.over()
            status.finish(code, message)
            if status.unwritten is not None:
                console.print(f"status.json is not of the end: {status.unwritten}", style="yellow")
            if ranks.main and run.accepted:
                page.refresh(folder)
            if code == PreemptedError.exit_code:
                ranks.wait()  # a launcher ends all as soon as one is gone, rank 0 with its last word unsaid


def _train(run: Run) -> None:
    config, ranks, signals = run.config, run.ranks, run.signals
    base = wiring.base_options(config, ranks.device)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when first used
    torch.use_deterministic_algorithms(config.train.deterministic)

    begun = resume.find(
        run.folder,
        config.checkpoint.resume_from_checkpoint,
        warn=lambda text: run.say(text, "yellow"),
    )
    with signals.phase("tokenizing", interruptible=True):
        architecture = check_model(config)  # what needs neither tokens nor weights, first
        tokenizer = load_tokenizer(base.name_or_path, base.revision)
        data = wiring.load_data(config, tokenizer)
        held_out = wiring.load_held_out(config, tokenizer) if config.evaluate.enabled else []
        wiring.use_template(tokenizer, data)
        run.say(describe_data(data, held_out))
        for line in concerns(config, tokenizer, data, held_out):
            run.say(f"         {line}", "yellow")
        run.status.note(data=facts_of_data(data, held_out))
    plan = plan_run(run, data, begun, architecture)
    config = run.config = settled(config, plan)
    loader = wiring.train_loader(config, tokenizer, data, ranks)
    total = config.train.max_steps
    if total <= 0:
        total = count_steps(loader, config.train.num_train_epochs)

    identity = wiring.identity(config, base, data, steps=total, ranks=ranks)
    if begun is not None:
        check(run, begun, identity | base_print(base), total)  # before anything is loaded

    with signals.phase("loading", interruptible=True):
        model = load_model(run, base, plan, begun)
        forward = make_forward(run, model, plan)
        optimizer = make_optimizer(
            config.optim.name,
            model.named_parameters(),
            betas=(config.optim.adam_beta1, config.optim.adam_beta2),
            eps=config.optim.adam_epsilon,
            weight_decay=config.optim.weight_decay,
            resident_bytes=plan.optimizer_resident,
        )
        fast = isinstance(forward, FusedForward)
        identity |= {"model.kernels": "fast" if fast else "reference", **base_print(base)}
        state = RunState(model, optimizer, Progress(), identity, ranks)
        set_seed(config.seed + ranks.rank)  # dropout differs between ranks, adapters do not
        accept(run, state, plan, begun, total)
        batches = [
            batch for part in held_out for batch in wiring.held_out_batches(config, tokenizer, part, ranks)
        ]

    first, started = state.progress.step, time.monotonic()
    run.status.note(first_step=first, total_steps=total)
    try:
        _loop(run, state, forward, loader, total, batches, plan)
    finally:
        run.status.note(measured=memory_used(ranks.device))
    run.say(describe_training(run, state.progress, first, time.monotonic() - started, plan))
    if not ranks.main:
        return
    measured: dict[str, dict[str, Any]] = {}
    if held_out:
        with signals.phase("evaluating", interruptible=True):
            answers = plan.offload == "none"  # the modules that would give them lack what is on the host
            if not answers and config.evaluate.task != "none":
                run.say(
                    f"model.offload={plan.offload}: answers are measured by `evaluate run={run.folder}`",
                    "yellow",
                )
            stops = stop_ids(tokenizer, model.get_base_model().generation_config)
            measured = comparison.compare(config, model, forward, tokenizer, stops, held_out, answers)
    with signals.phase("exporting", interruptible=True):
        export_adapter(
            model,
            tokenizer,
            run.folder / "adapter",
            TrainedOn.with_options(base, ranks.device),
            data=data.sources,
            settings=as_dict(config),
            title=run.folder.resolve().name,
            rows=wiring.rows_of(data, tokenizer),
        )
        comparison.record(run.folder, measured)
    run.say(_what_next(run.folder, base.name_or_path))


def _loop(
    run: Run,
    state: RunState,
    forward: FusedForward | ReferenceForward,
    loader: Loader,
    total: int,
    held_out: list[Batch],
    plan: RunPlan,
) -> None:
    config, ranks, signals = run.config, run.ranks, run.signals
    checkpoints = run.folder / resume.CHECKPOINTS
    trackers = _trackers(run, total, state.progress.step) if ranks.main else []
    micro_step: MicroStep | GraphedMicroStep
    if isinstance(forward, FusedForward) and plan.graphs:
        trainable = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        micro_step = GraphedMicroStep(forward, sft, trainable, longest=loader.longest)
    else:
        micro_step = MicroStep(forward, sft, ranks.device)

    def release() -> None:
        state.optimizer.release_gpu_pages()
        if isinstance(micro_step, GraphedMicroStep):
            micro_step.release()

    memory = MemoryGuard(
        ranks.device,
        release=release,
        planned=plan.peak.total,
        remedies=lambda: remedies(config, world_size=ranks.world_size),
    )

    def log(record: dict[str, Any]) -> None:
        run.status.tick(step=record["step"], total_steps=total)
        for tracker in trackers:
            tracker.log(record)

    def save(progress: Progress) -> None:
        with signals.phase("saving"):
            state.save(checkpoints)

    def tidy(progress: Progress) -> None:
        with signals.phase("saving"):
            if ranks.main:
                best = progress.best_step if config.checkpoint.keep_best else 0
                publish.retain(checkpoints, config.checkpoint.save_total_limit, best or None)

    def loss_of(batch: Batch) -> Tensor:
        with evaluating(state.model):
            return sft(forward(batch.to(ranks.device)))

    most = ranks.max(len(held_out))  # batches of any rank: one that has none evaluates with the others

    def evaluate() -> dict[str, float] | None:
        part = LossSum()
        when, rows = f"evaluating after step {state.progress.step}", config.evaluate.batch_size
        less = [f"evaluate.batch_size={rows // 2}"] if rows > 1 else None
        with signals.phase("evaluating"), evaluating(state.model):
            for start in range(0, most, EVALUATED_AT_ONCE):
                if ranks.any(signals.requested()):
                    return None
                some = held_out[start : start + EVALUATED_AT_ONCE]
                work = partial(measure_loss, forward, some, ranks.device)
                part += ranks.together(partial(memory.run, work, lambda: None, when, less))
            sums = torch.tensor([part.nll, part.weight, part.tokens], dtype=torch.float64)
            nll, weight, tokens = ranks.sum_control(sums).tolist()
            result = LossSum(nll, weight, int(tokens))
            return {"eval_loss": result.loss, "eval_perplexity": result.perplexity}

    with closing(trackers):
        if ranks.device.type == "cuda" and state.progress.step < total:
            with signals.phase("rehearsing", interruptible=True):
                rehearse(
                    micro_step,
                    loader.heaviest(state.progress.epoch),
                    loss_of,
                    widest(held_out),
                    state.optimizer,
                    memory,
                )
        with signals.phase("training"):
            train(
                Job(
                    state.progress,
                    micro_step,
                    state.optimizer,
                    loader,
                    ranks,
                    memory,
                    learning_rate(config, total),
                    total_steps=total,
                    max_grad_norm=config.train.max_grad_norm,
                    log=log,
                    save=save,
                    tidy=tidy,
                    evaluate=evaluate if most else None,
                    stop_requested=signals.requested,
                    save_steps=config.checkpoint.save_steps,
                    eval_steps=config.evaluate.eval_steps,
                    logging_steps=config.train.logging_steps,
                )
            )


def _trackers(run: Run, total: int, step: int) -> list[Tracker]:
    metrics = JsonlTracker(run.folder / "metrics.jsonl", step)
    if metrics.bad:
        lines = "1 line is no record" if metrics.bad == 1 else f"{metrics.bad:,} lines are no records"
        run.say(f"metrics.jsonl: {lines} and kept in {metrics.path.name}{BAD}", "yellow")
    trackers: list[Tracker] = [metrics, ConsoleTracker(total, step)]
    track = run.config.track
    if "wandb" in track.report_to:
        run_id = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:12]
        settings = redact.tree(as_dict(run.config))
        trackers.append(WandbTracker(settings["track"]["project"], run.folder, settings, run_id))
    return trackers


def _what_next(folder: Path, base: str) -> str:
    return (
        f"done     the adapter is in {folder / 'adapter'}\n"
        f"next     python -m qlora_trainer chat run={folder}\n"
        f"         python -m qlora_trainer evaluate run={folder}\n"
        f"         or load it with plain peft: {folder / 'adapter' / 'README.md'} says how\n"
        f"page     {folder / REPORT}"
    )
