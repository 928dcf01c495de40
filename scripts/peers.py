"""One peer, one process: the cells of the comparison run as that peer's users run it.

In: a checkpoint folder and a peer's name. Out: one `RESULT {json}` line a cell. A manual loop around
the peer's own model, its own patches and bitsandbytes' paged AdamW: no trainer's overhead is counted
against it. Variable-length rows are given to peers as full rows without isolation, which flatters them.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GIB = 1 << 30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A row of the table. `recompute`: the peer's own activation checkpointing is on."""

    name: str
    rows: int
    length: int
    recompute: bool = False
    packed: bool = False


CASES = [
    Case("4x2048, least memory", 4, 2048, recompute=True),
    Case("packed 8x2048, recompute", 8, 2048, recompute=True, packed=True),
    Case("4x2048, no recompute", 4, 2048),
    Case("1x2048", 1, 2048),
    Case("2x512", 2, 512),
    Case("packed 8x2048", 8, 2048, packed=True),
]


def time_steps(step: Callable[[], Any], warmup: int = 3, repeats: int = 8) -> tuple[float, float, float]:
    """(median seconds, peak allocated GiB, peak reserved GiB) of a step."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return statistics.median(seconds), allocated / GIB, reserved / GIB


def report(peer: str, case: str, tokens: int, step: Callable[[], Any], **more: Any) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        seconds, allocated, reserved = time_steps(step)
    except torch.cuda.OutOfMemoryError:
        found: dict[str, Any] = {"out_of_memory": True}
    else:
        found = {
            "tokens_s": tokens / seconds,
            "step_s": seconds,
            "allocated_gib": allocated,
            "reserved_gib": reserved,
        }
    print("RESULT " + json.dumps({"peer": peer, "case": case} | found | more), flush=True)


def _loop(model: Any, case: Case) -> Callable[[], None]:
    import bitsandbytes as bnb

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trainable, lr=2e-4)
    generator = torch.Generator("cuda").manual_seed(0)
    shape, vocabulary = (case.rows, case.length), model.config.vocab_size

    def step() -> None:
        ids = torch.randint(3, vocabulary, shape, device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_hf(path: str, rank: int, cases: list[Case], liger: bool) -> None:
    """transformers + PEFT + bitsandbytes, with Liger's kernels if asked."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)
    start = time.perf_counter()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
    )
    loaded = time.perf_counter() - start
    arguments = {"use_reentrant": False}
    base = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=arguments
    )
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    model.config.use_cache = False
    for case in cases:
        if case.recompute:
            model.gradient_checkpointing_enable(arguments)
        else:
            model.gradient_checkpointing_disable()
        step = _loop(model, case)
        report("hf+liger" if liger else "hf", case.name, case.rows * case.length, step, load_s=loaded)


def run_unsloth(path: str, rank: int, cases: list[Case]) -> None:
    """Unsloth as its notebooks run it."""
    from unsloth import FastLanguageModel

    start = time.perf_counter()
    longest = max(case.length for case in cases)
    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=longest, load_in_4bit=True, dtype=torch.bfloat16
    )
    loaded = time.perf_counter() - start
    model = FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing="unsloth", random_state=3407,
    )  # fmt: skip
    for case in cases:
        mode = "unsloth" if case.recompute else False
        FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)
        first = time.perf_counter()
        step = _loop(model, case)
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - first
        report(
            "unsloth", case.name, case.rows * case.length, step, load_s=loaded, first_step_s=loaded + seconds
        )


def run_trl(path: str, rank: int, cases: list[Case]) -> None:
    """TRL's SFTTrainer on token ids; seconds between the ends of its steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    for case in cases:
        clock = Clock()
        ids = torch.randint(3, 400, (12 * case.rows, case.length)).tolist()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        trainer = SFTTrainer(
            path,
            args=SFTConfig(
                output_dir="trl", max_steps=10, per_device_train_batch_size=case.rows, max_length=case.length,
                gradient_checkpointing=case.recompute, bf16=True, optim="paged_adamw_32bit", report_to=[],
                save_strategy="no", logging_strategy="no",
                model_init_kwargs={"quantization_config": quantization, "dtype": torch.bfloat16},
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            peft_config=LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        gaps = [b - a for a, b in zip(clock.ends[2:], clock.ends[3:], strict=False)]
        seconds = statistics.median(gaps)
        found = {
            "peer": "trl", "case": case.name, "step_s": seconds,
            "tokens_s": case.rows * case.length / seconds,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }  # fmt: skip
        print("RESULT " + json.dumps(found), flush=True)
        del trainer
        gc.collect()
        torch.cuda.empty_cache()


def run_ours(path: str, rank: int, cases: list[Case]) -> None:
    """This project: loaded from the same files, a policy a case as the plan would choose on this GPU."""
    from qlora_trainer.bench.cells import Cell
    from qlora_trainer.bench.measure import Bench
    from qlora_trainer.model.load import BaseOptions, load_base
    from qlora_trainer.model.lora import LoraOptions, attach

    bf16 = torch.bfloat16
    start = time.perf_counter()
    base = load_base(BaseOptions(path, dtype=bf16, compute_dtype=bf16), torch.device("cuda"))
    loaded = time.perf_counter() - start
    model = attach(base, LoraOptions(r=rank, lora_alpha=16), seed=0)
    bench = Bench(model, base.config.vocab_size)
    layers = base.config.num_hidden_layers
    names = {case.name for case in cases}
    small = (["offload"] * (layers - 1), ["mlp"])
    cells = [
        Cell("4x2048, no recompute", 4, 2048, resident_bytes=int(5.5 * GIB)),
        Cell("1x2048", 1, 2048, resident_bytes=20 * GIB),
        Cell("2x512", 2, 512, resident_bytes=20 * GIB),
        Cell("4x2048, no recompute, fp8", 4, 2048, base_gemm="fp8"),
        Cell("packed 8x2048", 8, 2048, mean_length=300, resident_bytes=14 * GIB),
        Cell("packed 8x2048, fp8", 8, 2048, mean_length=300, base_gemm="fp8"),
        Cell(
            "4x2048, least memory",
            4,
            2048,
            activations=small[0] + small[1],
            logits_bytes=64 << 20,
            embeddings="host",
        ),
    ]
    for cell in cells:
        if cell.name.removesuffix(", fp8") not in names:
            continue
        try:
            result, _ = bench.measure(cell)
        except torch.cuda.OutOfMemoryError:
            print(
                "RESULT " + json.dumps({"peer": "ours", "case": cell.name, "out_of_memory": True}), flush=True
            )
            continue
        found = {
            "peer": "ours", "case": cell.name, "tokens_s": result.non_pad_s, "step_s": result.step_s,
            "allocated_gib": result.allocated_gib, "reserved_gib": result.reserved_gib, "load_s": loaded,
            "first_step_s": loaded + result.first_step_s,
        }  # fmt: skip
        print("RESULT " + json.dumps(found), flush=True)


PEERS: dict[str, Callable[[str, int, list[Case]], None]] = {
    "ours": run_ours,
    "hf": lambda path, rank, cases: run_hf(path, rank, cases, liger=False),
    "hf+liger": lambda path, rank, cases: run_hf(path, rank, cases, liger=True),
    "trl": run_trl,
    "unsloth": run_unsloth,
}
