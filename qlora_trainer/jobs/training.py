"""The parts of a training run: the plan, the model, the forward, and what is said of each.

`train` puts them together; each function here takes the run and what came before.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import RenderableType
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_trainer.checkpoint.format import ADAPTER, Checkpoint
from qlora_trainer.config import claim
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data import TokenizedData, overlap
from qlora_trainer.data.screen import NOTES, REASONS, worries
from qlora_trainer.errors import ConfigError
from qlora_trainer.jobs import wiring
from qlora_trainer.jobs.fit import check_fit
from qlora_trainer.jobs.planning import facts_of, plan_of
from qlora_trainer.model.fingerprint import base_fingerprint
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.fused.decoder import FusedForward
from qlora_trainer.model.linears import in_kinds, quantized_share
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import attach
from qlora_trainer.model.offload import StreamedWeights, offload_layers
from qlora_trainer.model.residual import is_residual
from qlora_trainer.model.source import resolve
from qlora_trainer.plan import screen
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.plan import RunPlan, check, compare
from qlora_trainer.system import redact
from qlora_trainer.system.disk import atomic_write
from qlora_trainer.system.terminal import console
from qlora_trainer.track import jsonl
from qlora_trainer.train.distributed import Ranks
from qlora_trainer.train.job import Progress
from qlora_trainer.train.signals import Status, StopSignals
from qlora_trainer.train.state import versions

PLAN_FILE = "plan.json"
MEDIAN_OF = 5  # steps, for a speed that compiling and planning have not bent


@dataclass
class Run:
    """What the stages of one training run share.

    Attributes:
        asked: config.yaml as the user asked for it; `config` becomes what was settled of it.
        accepted: nothing can refuse this start any more (or the folder held no run): it may be written to.
    """

    config: RunConfig
    folder: Path
    ranks: Ranks
    signals: StopSignals
    status: Status
    asked: bytes
    accepted: bool = False

    def accept(self) -> None:
        """Takes the folder over from an earlier start; until then every byte of it stays as it was."""
        if not self.accepted and self.ranks.main:
            atomic_write(self.folder / claim.CONFIG_FILE, self.asked)
            self.status.write_to(self.folder / "status.json")
        self.accepted = True

    def say(self, text: RenderableType, style: str | None = None) -> None:
        """Prints on one rank; in `style`, for the text itself carries no markup."""
        if self.ranks.main:
            console.print(text, style=style, soft_wrap=True)


def load_model(run: Run, base: BaseOptions, plan: RunPlan, begun: Checkpoint | None) -> PeftModel:
    config, device = run.config, run.ranks.device
    started = time.monotonic()
    streamed = plan.offload == "layers"
    model = load_base(
        base,
        torch.device("cpu") if streamed else device,
        say=lambda line: run.say(f"         {line}", "dim"),
    )
    share = quantized_share(model)
    if not config.quantization.allow_partial:  # the plan has asked, but which layers GPTQ left is known now
        share.check(base.method)
    options = wiring.lora_options(config)
    stored = None
    if begun is not None and is_residual(options.init_lora_weights):
        stored = begun.tensors(ADAPTER)
    adapted = attach(model, options, config.seed, stored)
    adapted.train()
    if streamed:
        offload_layers(adapted, model.model.layers, device)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    # Of the model and not of the options: a checkpoint that comes quantized has its own.
    stored = getattr(model.config, "quantization_config", None)
    double = " + double quantization" if getattr(stored, "bnb_4bit_use_double_quant", False) else ""
    run.say(
        f"model    {base.name_or_path}  {base.method}{double}, "
        f"{'' if base.method == 'none' else f'{share}, '}"
        f"{str(base.dtype).removeprefix('torch.')} on {run.ranks.device}, "
        f"{trainable:,} adapter parameters, loaded in {time.monotonic() - started:.1f} s"
    )
    return adapted


def plan_run(run: Run, data: TokenizedData, begun: Checkpoint | None, model: Architecture) -> RunPlan:
    """Says what the run will need before any weight loads; the same micro-batch on every rank.

    The caller writes plan.json when the start is accepted.

    `begun`: the checkpoint that the run goes on from. Under `train.per_device_train_batch_size=auto` its
    micro-batch stays, because with another the numbers would differ.

    Raises:
        ConfigError: it cannot fit.
    """
    facts, ranks = facts_of(data), run.ranks
    rows = begun.state["identity"].get("train.per_device_train_batch_size") if begun else None
    plan = plan_of(run.config, facts, ranks.world_size, rows, model)
    smallest = -ranks.max(-plan.rows)  # of the ranks' choices: one may have less memory
    if smallest != plan.rows:
        plan = plan_of(run.config, facts, ranks.world_size, smallest, model)
    if run.ranks.main:
        screen.show(plan, console)
        if run.accepted:
            screen.write(plan, run.folder / PLAN_FILE)
    check(plan)
    return plan


def make_forward(run: Run, model: PeftModel, plan: RunPlan) -> FusedForward | ReferenceForward:
    """The fast path, or the reference where the configuration or the model asks for it."""
    config = run.config
    forward: FusedForward | ReferenceForward = ReferenceForward(model)
    if config.model.kernels == "auto":
        forward, report = fuse(
            model,
            activations=plan.policies,
            base_gemm=config.train.base_gemm,
            resident_bytes=plan.dequantized,
            embeddings="device" if plan.offload == "none" else "host",
        )
        if plan.offload == "layers":
            if not isinstance(forward, FusedForward):
                raise ConfigError(f"model.offload=layers needs the fast path: {'; '.join(report.lines())}")
            StreamedWeights(forward)
        for line in report.lines():
            run.say(f"         {line}", "dim")
    else:
        run.say(f"         model: reference: {plan.reference_because}", "dim")
    if isinstance(forward, ReferenceForward):
        if "full" in plan.policies:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if unreached := forward.check():
            names = ", ".join(sorted({in_kinds(name) for name in unreached}))
            run.say(
                f"         no token of a text reaches {len(unreached)} adapter matrices: {names}", "yellow"
            )
    return forward


def base_print(base: BaseOptions) -> dict[str, str]:
    """The field of the identity that stands for the base's weights; empty while they are not here."""
    found = base_fingerprint(resolve(base.name_or_path, base.revision), base.revision)
    return {"model.base": found} if found else {}


def describe_data(data: TokenizedData, held_out: list[TokenizedData]) -> str:
    """What was read, a line for each part."""
    lines = []
    for name, part in [("data", data), *(("held out", part) for part in held_out)]:
        ledger = part.ledger
        dropped = f", {ledger.read - ledger.kept} dropped" if ledger.read > ledger.kept else ""
        formats = "/".join(sorted(set(part.formats)))
        lines.append(
            f"{name:<8} {', '.join(part.sources)}  {formats}: {len(part):,} documents{dropped}, "
            f"{part.n_tokens:,} tokens, {part.n_supervised / part.n_tokens:.0%} supervised"
        )
    return "\n".join(lines)


def concerns(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenizedData,
    held_out: list[TokenizedData],
) -> list[str]:
    """What is probably not meant about the data, a line for each.

    Raises:
        DataError, ConfigError: where it cannot be.
    """
    remarks = [remark for part in (data, *held_out) for remark in part.ledger.remarks + worries(part.ledger)]
    limits = wiring.limits(config)
    fit = check_fit(limits, [data, *held_out], tokenizer) if limits is not None else []
    return [*dict.fromkeys(remarks), *fit, *overlap.check(data, held_out, given=bool(config.data.eval_path))]


def facts_of_start(ranks: Ranks) -> dict[str, Any]:
    """What status.json says of the machine, the libraries and the line that started this process."""
    launcher = f"accelerate launch --multi_gpu --num_processes {ranks.world_size}" * (ranks.world_size > 1)
    arguments = shlex.join(map(redact.text, sys.argv[1:]))  # before quotes change what they hold
    line = f"{launcher or 'python'} -m qlora_trainer {arguments}"
    cuda = ranks.device.type == "cuda"
    return {
        "command": line,
        "versions": versions() | ({"CUDA": str(torch.version.cuda)} if cuda else {}),
        "machine": {
            "device": torch.cuda.get_device_name(ranks.device) if cuda else f"{platform.machine()} CPU",
            "processes": ranks.world_size,
            "CPU threads": torch.get_num_threads(),
        },
    }


def facts_of_data(data: TokenizedData, held_out: list[TokenizedData]) -> list[dict[str, Any]]:
    """What `describe_data` says, as plain values, and why rows were dropped."""
    return [
        {
            "role": role,
            "sources": part.sources,
            "formats": sorted(set(part.formats)),
            "rows": part.ledger.read,
            "dropped": {REASONS.get(name, name): count for name, count in part.ledger.dropped.items()},
            "notes": {NOTES.get(name, name): count for name, count in part.ledger.notes.items()},
            "remarks": part.ledger.remarks,
            "documents": len(part),
            "tokens": part.n_tokens,
            "supervised": part.n_supervised,
            "longest": int(part.lengths.max()),
        }
        for role, part in [("training", data), *(("held out", part) for part in held_out)]
    ]


def memory_used(device: torch.device) -> dict[str, int]:
    """Peaks of this process so far, in bytes: of its RAM, and of what it allocated on a GPU."""
    # Not getrusage: its peak begins at what the parent held when it forked, and a launcher holds torch.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peaks = {"peak_host": int(status["VmHWM"].split()[0]) * 1024}  # "123 kB"
    if device.type == "cuda":
        peaks["peak_allocated"] = torch.cuda.max_memory_allocated(device)
    return peaks


def describe_training(run: Run, progress: Progress, first: int, seconds: float, plan: RunPlan) -> Text:
    """What was done, predicted beside measured; the measurement goes into plan.json too."""
    steps = progress.step - first
    if not steps:
        return Text(f"trained  already at step {progress.step}; nothing left to do")
    count = "1 step" if steps == 1 else f"{steps} steps"
    lines = [Text(f"trained  {count} in {seconds:.0f} s; {progress.supervised:,} supervised tokens in all")]
    if run.ranks.main:
        measured = memory_used(run.ranks.device) | speed_of(run.folder / "metrics.jsonl", first)
        lines += [Text(line, "yellow" * ("off by" in line)) for line in compare(plan, measured)]
        screen.write(plan, run.folder / PLAN_FILE, {"seconds_per_step": seconds / steps, **measured})
    return Text("\n").join(lines)


def speed_of(metrics: Path, first: int) -> dict[str, float]:
    """Tokens a second of the median step after `first`, where enough have been to have a median."""
    found = (record.get("tokens_per_second") for record in jsonl.read(metrics) if record["step"] > first)
    speeds = [speed for speed in found if isinstance(speed, int | float) and speed > 0]
    return {"tokens_per_second": statistics.median(speeds)} if len(speeds) >= MEDIAN_OF else {}
