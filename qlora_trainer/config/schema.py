"""Every key a recipe or a command line may set: type, default, meaning, and when it has effect.

Structured configs for Hydra: composing a recipe onto `RunConfig` checks names and types; what
depends on more than one key is in `checks.py`. Keys carry the names that transformers, peft and
bitsandbytes use for the same thing. Sizes are bytes or tokens as stated. `facts.py` has what a field
says beside its type; `FACTS` below has all of it by dotted key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Optional

from qlora_trainer.config.facts import CONTENT, FREE, LENGTH, SAME, Facts, FromHub, Place, When, key

_training = partial(key, by=("train",))
_rows = partial(key, by=("train", "evaluate", "export", "verify"))
_evaluating = partial(key, by=("train", "evaluate"))
_chatting = partial(key, by=("chat",))
_exporting = partial(key, by=("export",))
_verifying = partial(key, by=("export", "verify"), when=When("export.verify", (True,), command="export"))
_everywhere = partial(key, by=("train", "evaluate", "chat", "export", "verify"))

_FOUR_BIT = When("quantization.method", ("nf4", "fp4"))
_PAGED = When("optim.name", ("paged_adamw_32bit", "paged_adamw_8bit"))
_MERGED = When("export.format", ("merged", "gptq", "awq", "rtn", "int8", "nf4", "gguf"))
_GROUPED = When("export.format", ("gptq", "awq", "rtn"))
_CALIBRATED = When("export.format", ("gptq", "awq"))
_HUB_DATA = FromHub(("data.path", "data.eval_path"))


@dataclass
class ModelConfig:
    model_name_or_path: Optional[str] = _everywhere(
        None, CONTENT, "hub name, folder, or `builtin:smollm2-135m-instruct`", place=Place.IF_THERE
    )
    revision: Optional[str] = _everywhere(
        None,
        CONTENT,
        "of a hub model: branch, tag or commit",
        when=FromHub(("model.model_name_or_path",)),
    )
    dtype: str = _training(
        "auto", SAME, "of what is not quantized; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attn_implementation: str = _training("auto", SAME, "auto | sdpa | eager | flash_attention_2")
    kernels: str = _training(
        "auto", SAME, "auto: the fast path where the model allows it | reference: plain libraries"
    )
    offload: str = _training(
        "none", FREE, "none | embeddings | layers (4-bit ones stream from host memory) | auto (if needed)"
    )
    device: str = _everywhere("auto", SAME, "auto | cpu | cuda")
    trust_remote_code: bool = _training(False, SAME, "run code from the model's repository")
    cache_quantized: bool = key(
        False,
        FREE,
        "keep what was quantized in ~/.cache/qlora_trainer and load it from there",
        by=("train", "evaluate", "chat"),
        when=When("quantization.method", ("nf4", "fp4", "int8")),
    )


@dataclass
class QuantizationConfig:
    method: str = _training("nf4", SAME, "of the frozen base: nf4 | fp4 | int8 | gptq | awq | none")
    bnb_4bit_use_double_quant: bool = _training(
        True, SAME, "quantize the blocks' constants too", when=_FOUR_BIT
    )
    bnb_4bit_compute_dtype: str = _training(
        "auto", SAME, "that 4-bit layers dequantize to; auto: model.dtype", when=_FOUR_BIT
    )
    allow_partial: bool = _training(
        False, FREE, "train though less than 90% of the body's weights would be quantized"
    )


@dataclass
class LoraConfig:
    r: int = _training(64, SAME, "rank of the adapters")
    lora_alpha: float = _training(16, SAME, "adapters are scaled by lora_alpha / r")
    lora_dropout: float = _training(0.0, SAME, "share of the adapters' inputs that a step drops")
    target_modules: Any = _training(
        "all-linear",
        SAME,
        "all-linear, ends of names [q_proj,v_proj], or a regular expression over whole names",
    )
    modules_to_save: Optional[list[str]] = _training(None, SAME, "modules that are trained whole")
    use_rslora: bool = _training(False, SAME, "scale by lora_alpha / sqrt(r)")
    use_dora: bool = _training(False, SAME, "weight-decomposed adapters")
    init_lora_weights: Any = _training(
        True,
        SAME,
        "true | gaussian | orthogonal | pissa | pissa_niter_4 | olora; the last three begin in the weights "
        "of an unquantized base and are stored as plain LoRA of rank 2r",
    )
    dtype: str = _training("bfloat16", SAME, "of the adapter in the forward pass; masters are always float32")


@dataclass
class DataConfig:
    path: Any = _rows(
        None,
        CONTENT,
        "file, folder, hub name, `builtin:restaurant`; a list of them or of {path, weight, …}",
        place=Place.IF_THERE,
    )
    name: Optional[str] = _rows(None, CONTENT, "of a hub dataset's configuration", when=_HUB_DATA)
    split: str = _rows(
        "train",
        CONTENT,
        "of a dataset, of a folder or JSON document that holds several; `all`: everything local",
    )
    revision: Optional[str] = _rows(None, CONTENT, "of a hub dataset: branch, tag or commit", when=_HUB_DATA)
    format: str = _rows(
        "auto", CONTENT, "auto | alpaca | messages | sharegpt | prompt_completion | text | oasst"
    )
    columns: dict[str, str] = _rows({}, CONTENT, "our column names -> the file's")
    template: Optional[str] = _rows(
        None, CONTENT, "null: the tokenizer's own; alpaca chatml gemma …; a jinja file", place=Place.IF_PLAIN
    )
    eval_path: Any = _rows(None, FREE, "held-out rows, given as `path` is", place=Place.IF_THERE)
    eval_fraction: float = _rows(
        0.0, CONTENT, "held out of the rows of `path`, chosen by their content and the seed"
    )
    max_rows: Optional[int] = _rows(None, CONTENT, "only the first so many usable rows")
    train_on_inputs: bool = _rows(False, CONTENT, "supervise prompts too")
    train_on_last_turn_only: bool = _rows(False, CONTENT, "supervise only the last answer")
    on_bad_row: str = _rows("error", CONTENT, "error | skip")
    on_lost_content: str = _rows(
        "error", CONTENT, "error | warn, where the chat template leaves out part of what a row says"
    )
    overlong: str = _rows("truncate_right", CONTENT, "drop | truncate_left | truncate_right | split | error")
    sample_by: str = _rows("line", CONTENT, "a row of a text file: line | paragraph | document")
    streaming: bool = _rows(
        False, CONTENT, "read a hub dataset over the network, not from a download", when=_HUB_DATA
    )
    cache_dir: Optional[str] = _rows(
        None, FREE, "of tokenized data; null: ~/.cache/qlora_trainer/tokenized", place=Place.ALWAYS
    )
    num_workers: int = _training(0, FREE, "threads that prepare batches ahead")


@dataclass
class TrainConfig:
    per_device_train_batch_size: int | str = _training(
        1,
        SAME,
        "rows of a micro-batch (packs, when packing). auto: as the plan finds fastest of what fits; then "
        "gradient_accumulation_steps counts rows, so a step has the same tokens whatever is chosen. A "
        "resumed run keeps what it began with",
    )
    gradient_accumulation_steps: int = _training(16, SAME, "micro-batches of a step")
    learning_rate: float = _training(2e-4, SAME, "at its peak")
    lr_scheduler_type: str = _training("constant", SAME, "constant | linear | cosine, after the warm-up")
    warmup_ratio: float = _training(0.03, SAME, "share of the steps in which the learning rate rises from 0")
    max_grad_norm: float = _training(0.3, SAME, "gradients longer than this are cut to it; 0: never")
    num_train_epochs: float = _training(
        1.0, LENGTH, "passes over the data", when=When("train.max_steps", (-1,))
    )
    max_steps: int = _training(-1, LENGTH, "optimizer steps; overrides epochs when positive")
    max_length: int = _rows(512, SAME, "tokens of a row at most")
    packing: bool = _training(False, SAME, "several documents in a row, none of which sees another")
    group_by_length: bool = _training(False, SAME, "rows of like length in a micro-batch")
    activations: str = _training(
        "auto",
        FREE,
        "auto (the plan's mix) | none | mlp (recompute gate and up) | full (all but down) | offload, "
        "full_offload (as mlp and full, with what they keep in host memory)",
    )
    base_gemm: str = _training(
        "bf16",
        SAME,
        "bf16 | fp8, opt-in on Hopper and Ada: products with the frozen base in e4m3",
        when=When("model.kernels", ("auto",)),
    )
    deterministic: bool = _training(False, SAME, "only operations that give the same bits every time")
    logging_steps: int = _training(1, FREE, "steps between two records")


@dataclass
class OptimConfig:
    name: str = _training(
        "paged_adamw_32bit",
        SAME,
        "paged_adamw_32bit | paged_adamw_8bit | adamw | adamw_8bit | bnb_paged_adamw_32bit (bitsandbytes' "
        "own, in managed memory, for comparison)",
    )
    resident_gib: Optional[float] = _training(
        None, FREE, "paged state that may stay on the GPU; null: the plan's choice", when=_PAGED
    )
    adam_beta1: float = _training(0.9, SAME, "decay of the first moment")
    adam_beta2: float = _training(0.999, SAME, "decay of the second moment")
    adam_epsilon: float = _training(1e-8, SAME, "added to the second moment's root")
    weight_decay: float = _training(0.0, SAME, "decoupled, as AdamW's")


@dataclass
class CheckpointConfig:
    save_steps: int = _training(200, FREE, "steps between two checkpoints")
    save_total_limit: int = _training(2, FREE, "the newest so many are kept")
    resume_from_checkpoint: str = _training(
        "auto", FREE, "auto | never | a checkpoint folder", place=Place.IF_PLAIN
    )
    allow_change: list[str] = _training(
        [], FREE, "of the run's identity: `train.packing`, `data` …, that a resumed run may change"
    )
    keep_best: bool = _training(
        True, FREE, "beside the newest `save_total_limit`, the one with the lowest evaluation loss"
    )


@dataclass
class TrackConfig:
    report_to: list[str] = _training([], FREE, "wandb")
    project: str = _training("qlora_trainer", FREE, "of W&B", when=When("track.report_to", ("wandb",)))


@dataclass
class EvaluateConfig:
    enabled: bool = _training(True, FREE, "measure held-out rows in training")
    eval_steps: int = _training(
        0, FREE, "steps between two evaluations; 0: only at the end", when=When("evaluate.enabled", (True,))
    )
    max_rows: Optional[int] = _evaluating(None, FREE, "held-out rows that are measured; null: all")
    task: str = _evaluating("none", FREE, "none | exact_match")
    max_new_tokens: int = _rows(128, FREE, "of an answer")
    batch_size: int = _evaluating(8, FREE, "rows measured, and questions answered, together")
    examples: int = _evaluating(
        5, FREE, "answers that are shown", when=When("evaluate.task", ("exact_match",))
    )
    lm_eval_tasks: list[str] = key([], FREE, "of lm-evaluation-harness", by=("evaluate",))
    lm_eval_path: Optional[str] = key(
        None,
        FREE,
        "a folder of further tasks, as its YAML",
        by=("evaluate",),
        when=When("evaluate.lm_eval_tasks"),
        place=Place.ALWAYS,
    )


@dataclass
class ChatConfig:
    max_new_tokens: int = _chatting(512, FREE, "of an answer")
    temperature: float = _chatting(0.0, FREE, "0: always the likeliest token")
    top_p: float = _chatting(1.0, FREE, "of the likeliest tokens' sum", when=When("chat.temperature"))
    system: Optional[str] = _chatting(None, FREE, "opens every conversation")


@dataclass
class ExportConfig:
    format: list[str] = _exporting(["adapter"], FREE, "adapter merged gptq awq rtn int8 nf4 gguf")
    adapter: Optional[str] = key(
        None,
        FREE,
        "a PEFT adapter folder that this program did not train, instead of `run`",
        by=("export", "verify"),
        place=Place.ALWAYS,
    )
    merge_base: str = _exporting(
        "trained",
        FREE,
        "trained: onto the base dequantized as trained against | original: its 16-bit weights",
        when=_MERGED,
    )
    dtype: str = _exporting("auto", FREE, "of merged weights; auto: the base checkpoint's", when=_MERGED)
    bits: int = _exporting(4, FREE, "gptq, rtn: 3 4 8; awq: 4", when=_GROUPED)
    group_size: int = _exporting(128, FREE, "weights that share a scale; -1: whole rows", when=_GROUPED)
    sym: bool = _exporting(True, FREE, "symmetric around zero; false: with zero points", when=_GROUPED)
    desc_act: bool = _exporting(
        False,
        FREE,
        "columns with the largest activations are quantized first",
        when=When("export.format", ("gptq",)),
    )
    gguf_type: str = _exporting(
        "q8_0",
        FREE,
        "f16 | bf16 | q8_0 | q6_k | q5_k_m | q5_1 | q5_0 | q4_k_m | q4_1 | q4_0",
        when=When("export.format", ("gguf",)),
    )
    calibration: Any = _exporting(
        "train",
        FREE,
        "train: the run's rows | self: what the base says unasked | c4 | wikitext | a file or dataset; "
        "or a list of them, in equal parts",
        when=_CALIBRATED,
        place=Place.IF_PLAIN,
    )
    calibration_samples: int = _exporting(128, FREE, "sequences", when=_CALIBRATED)
    calibration_length: int = _exporting(512, FREE, "tokens of each", when=_CALIBRATED)
    overwrite: bool = _exporting(False, FREE, "replace an export that was made otherwise")
    verify: bool = _exporting(True, FREE, "reload and measure each export; over its bound: exit 3")
    max_kl: Optional[float] = _verifying(None, FREE, "nats a token; null: the format's own bound")
    verify_rows: int = _verifying(64, FREE, "rows that are measured")
    verify_questions: int = _verifying(16, FREE, "questions that are asked")
    verify_text: Optional[str] = _verifying(
        None, FREE, "measured on this file instead of the held-out rows", place=Place.IF_THERE
    )
    push_to_hub: Optional[str] = _exporting(None, FREE, "owner/name")
    hub_private: bool = _exporting(True, FREE, "who may see it there", when=When("export.push_to_hub"))


@dataclass
class PlanConfig:
    gpu: Optional[str] = _training(
        None, FREE, '"24GiB", or the name of a card that the plan is for; null: this machine\'s'
    )
    num_processes: Optional[int] = key(
        None, FREE, "that the run will be launched with; null: as this command is", by=("plan",)
    )


@dataclass
class RunConfig:
    recipe: Optional[str] = _everywhere(None, FREE, "what to start from: a name, or a YAML file")
    output_dir: Optional[str] = _everywhere(None, FREE, "the run's folder; null: outputs/<recipe>")
    seed: int = _everywhere(42, SAME, "of adapters, order, dropout, and which rows are held out")
    run: Optional[str] = _everywhere(
        None, FREE, "evaluate, chat, export, verify: the folder of a finished run"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def _facts(section: Any, prefix: str = "") -> Iterator[tuple[str, Facts]]:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _facts(value, f"{prefix}{item.name}.")
        else:
            assert "facts" in item.metadata, f"{prefix}{item.name} does not say what it is: use facts.key"
            yield prefix + item.name, item.metadata["facts"]


FACTS: dict[str, Facts] = dict(_facts(RunConfig()))
