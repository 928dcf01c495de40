"""Whether a start of `train` may go on with what is in the folder, and from where.

Everything that can refuse it comes first, as soon as it can be known; then the folder is written to for the
first time, and what lies ahead of the step that it goes on from is set aside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_trainer.checkpoint import publish, resume
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.checkpoint.same import check_same_run, covered
from qlora_trainer.config import claim
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.jobs.training import PLAN_FILE, Run
from qlora_trainer.jobs.wiring import WHEN_LOADED
from qlora_trainer.optim import schedule
from qlora_trainer.plan import screen
from qlora_trainer.plan.plan import RunPlan
from qlora_trainer.system import disk
from qlora_trainer.train.state import RunState, changed_surroundings

METRICS = "metrics.jsonl"


def check(run: Run, checkpoint: Checkpoint, identity: dict[str, Any], total: int) -> None:
    """Whether a run of this `identity` and of `total` steps may go on from `checkpoint`.

    Args:
        identity: fields of `wiring.WHEN_LOADED` that are not known yet are taken to be the same.

    Raises:
        ConfigError: not the same run, already longer, or the learning rate would jump.
    """
    if checkpoint.step > total:
        raise ConfigError(
            f"{run.folder} has been trained for {checkpoint.step} steps and {total} are asked for: raise "
            "train.max_steps, choose another output_dir, or set checkpoint.resume_from_checkpoint=never"
        )
    allowed = run.config.checkpoint.allow_change
    planned = checkpoint.state["identity"]["train.max_steps"]
    jump = _jump(run.config, checkpoint.step, planned, total)
    if jump and not covered("train.max_steps", allowed):
        raise ConfigError(
            f"train.max_steps: {run.folder} was laid out for {planned} steps and {total} are asked for now; "
            f"under train.lr_scheduler_type={run.config.train.lr_scheduler_type} {jump}. Choose another "
            "output_dir, or go on so with checkpoint.allow_change=[train.max_steps]"
        )
    saved = checkpoint.state["identity"] | {"train.max_steps": total}
    check_same_run(saved, {name: saved.get(name) for name in WHEN_LOADED} | identity, allowed)


def accept(run: Run, state: RunState, plan: RunPlan, checkpoint: Checkpoint | None, total: int) -> None:
    """Makes `state` that of `checkpoint`, if there is one, and takes the folder over for `total` steps.

    Raises:
        ConfigError: see `check`.
        CheckpointError: the checkpoint does not fit the model, or the disk will not hold the run.
    """
    if checkpoint is not None:
        check(run, checkpoint, state.identity, total)
        state.restore(checkpoint)
        run.say(f"resume   {checkpoint.folder}, step {checkpoint.step} of {total}")
        planned = checkpoint.state["identity"]["train.max_steps"]
        if jump := _jump(run.config, checkpoint.step, planned, total):
            run.say(f"         laid out for {planned} steps, of {total} now: {jump}", "yellow")
        if changed := changed_surroundings(checkpoint):
            run.say(f"         the last bits of the numbers may differ: {', '.join(changed)}", "yellow")
    if run.ranks.main:
        _require_space(run, state, total)
    run.ranks.wait()
    if run.ranks.main:
        step = checkpoint.step if checkpoint is not None else None
        products = [name for name in claim.PRODUCTS if (run.folder / name).exists()]
        if products == [METRICS] and run.config.checkpoint.resume_from_checkpoint != "never":
            products = []  # of a start that was killed before its first checkpoint: its steps are made again
        if aside := resume.set_aside(run.folder, step, products, [claim.CONFIG_FILE]):
            run.say(f"what an earlier start left is kept in {aside}", "yellow")
    run.accept()
    if run.ranks.main:
        screen.write(plan, run.folder / PLAN_FILE)


def learning_rate(config: RunConfig, total: int) -> Callable[[int], float]:
    """Step (from 0) -> learning rate of a run of `total` steps."""
    train = config.train
    return partial(
        schedule.learning_rate,
        train.lr_scheduler_type,
        peak=train.learning_rate,
        warmup=schedule.warmup_steps(train.warmup_ratio, total),
        total=total,
    )


def _jump(config: RunConfig, step: int, planned: int, total: int) -> str:
    """How the learning rate after `step` is otherwise in a run of `total` steps than as `planned`.

    Empty if it is not: then more or fewer steps are the same run.
    """
    before, after = (learning_rate(config, length)(step) for length in (planned, total))
    if before == after or step == total:
        return ""
    return f"the learning rate jumps from {before:.3g} to {after:.3g} after step {step}"


def _require_space(run: Run, state: RunState, total: int) -> None:
    """Ends the run before its first step if the disk will not hold its checkpoints and its adapter."""
    options = run.config.checkpoint
    left = total - state.progress.step
    saves = 1 + (left // options.save_steps if options.save_steps else 0)
    checkpoint, adapter = state.sizes()
    needed = adapter + publish.space_needed(
        run.folder / resume.CHECKPOINTS, checkpoint, saves, options.save_total_limit, options.keep_best
    )
    disk.require_space(run.folder, needed, f"{run.folder}, with its checkpoints,")
