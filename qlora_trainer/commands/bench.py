"""Measure training steps on this GPU with random weights of any config.json."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.jobs import wiring
from qlora_trainer.jobs.planning import plan_of
from qlora_trainer.system.disk import write_json
from qlora_trainer.system.terminal import results


def run(config: RunConfig) -> None:
    """Print tokens a second, memory, model FLOPs utilisation and where the time goes; write bench.json.

    Shapes are the configuration's: train.per_device_train_batch_size, train.max_length,
    train.gradient_accumulation_steps, and train.packing (documents of 300 tokens on average).

    Raises:
        ConfigError: there is no CUDA GPU, or the fast path does not know the model.
    """
    import torch
    from transformers import AutoConfig

    from qlora_trainer.bench import measure
    from qlora_trainer.bench.cells import Cell
    from qlora_trainer.model.load import pick_device
    from qlora_trainer.model.lora import attach
    from qlora_trainer.model.source import read_config
    from qlora_trainer.model.synthetic import random_base

    device = pick_device(config.model.device)
    if device.type != "cuda":
        raise ConfigError("bench measures a CUDA GPU and there is none here; `plan` estimates without one")
    started = time.perf_counter()
    plan = plan_of(config)
    base = wiring.base_options(config, device)
    shape = AutoConfig.for_model(**read_config(base.name_or_path, base.revision))
    weights = random_base(
        shape,
        device,
        method=base.method,
        double_quant=base.double_quant,
        dtype=base.dtype,
        seed=config.seed,
    )
    model = attach(weights, wiring.lora_options(config), config.seed)
    cell = Cell(
        name=config.recipe or Path(base.name_or_path).name,
        rows=plan.rows,
        length=config.train.max_length,
        accumulation=plan.accumulation,
        mean_length=300 if config.train.packing else None,
        activations=list(plan.policies),
        base_gemm=config.train.base_gemm,
        resident_bytes=plan.dequantized,
        embeddings="device" if plan.offload == "none" else "host",
    )
    planned = "" if plan.seconds_per_step is None else f", {plan.seconds_per_step:.2f} s each by the plan"
    steps = f"steps of {cell.accumulation} x {cell.rows} x {cell.length} tokens{planned}; the first compiles"
    results.print(f"random weights of {base.name_or_path}; {steps}", style="dim", soft_wrap=True)
    torch.cuda.reset_peak_memory_stats()
    result, profile = measure.Bench(model, shape.vocab_size).measure(cell, profile=True)
    assert profile is not None
    total = sum(profile.kinds.values())
    flops = measure.model_flops(model, shape, cell.mean_length or cell.length)
    ceiling = measure.matrix_rate(device)

    table = Table(title=f"{cell.name} on one {torch.cuda.get_device_name(device)}", show_header=False)
    table.add_row("micro-batch", f"{cell.rows} x {cell.length} tokens, {cell.accumulation} a step")
    table.add_row("activations", plan.policy_summary())
    table.add_row("tokens a second", f"{result.tokens_s:,.0f}")
    table.add_row("  without padding", f"{result.non_pad_s:,.0f}")
    table.add_row("  supervised", f"{result.supervised_s:,.0f}")
    table.add_row("step", f"{result.step_s * 1e3:,.1f} ms")
    table.add_row(
        "peak memory", f"{result.allocated_gib:.2f} GiB allocated, {result.reserved_gib:.2f} reserved"
    )
    utilisation = result.tokens_s * flops / ceiling
    table.add_row(
        "model FLOPs", f"{flops / 1e9:.1f} GFLOP a token, {utilisation:.0%} of {ceiling / 1e12:.0f} TFLOP/s"
    )
    ready = time.perf_counter() - started
    table.add_row(
        "first step", f"{result.first_step_s:.1f} s after the weights were made ({ready:.0f} s in all)"
    )
    results.print(table)
    where = Table("kernels", "ms a step", "share", title="where the time goes")
    for kind, milliseconds in profile.kinds.items():
        where.add_row(kind, f"{milliseconds:.1f}", f"{milliseconds / total:.0%}")
    results.print(where)
    folder = Path(str(config.output_dir or "outputs/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "result": asdict(result), "flops_per_token": flops, "matrix_rate": ceiling, "kinds": profile.kinds,
        "kernels": [{"name": n, "launches": c, "ms": ms} for n, c, ms in profile.kernels],
        "torch": torch.__version__, "gpu": torch.cuda.get_device_name(device), "cell": asdict(cell),
    }  # fmt: skip
    write_json(folder / "bench.json", record)
    results.print(f"kernel by kernel: {folder / 'bench.json'}")
