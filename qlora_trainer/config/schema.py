"""Every key a recipe or a command line may set, with its type and default.

Structured configs for Hydra: composing a recipe onto `RunConfig` checks names and types; what
depends on more than one key is in `checks.py`. Keys carry the names that transformers, peft and
bitsandbytes use for the same thing. Sizes are bytes or tokens as stated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class ModelConfig:
    model_name_or_path: Optional[str] = None  # hub name, folder, or `builtin:smollm2-135m-instruct`
    revision: Optional[str] = None
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    attn_implementation: str = "auto"  # auto | sdpa | eager | flash_attention_2
    kernels: str = "auto"  # auto | reference
    offload: str = (
        "none"  # none | embeddings | layers (4-bit ones stream from host memory) | auto (if needed)
    )
    device: str = "auto"  # auto | cpu | cuda
    trust_remote_code: bool = False
    cache_quantized: bool = False  # keep what was quantized in ~/.cache/qlora_trainer and load it from there


@dataclass
class QuantizationConfig:
    method: str = "nf4"  # nf4 | fp4 | int8 | gptq | awq | none
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str = "auto"  # auto: model.dtype


@dataclass
class LoraConfig:
    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Any = "all-linear"  # or a list of module name suffixes
    modules_to_save: Optional[list[str]] = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True  # true | gaussian | …, as PEFT
    dtype: str = "bfloat16"  # of the adapter in the forward pass; masters are always float32


@dataclass
class DataConfig:
    path: Any = None  # file, folder, hub name, `builtin:restaurant`; a list of them or of {path, weight, …}
    name: Optional[str] = None
    split: str = "train"
    revision: Optional[str] = None
    format: str = "auto"  # auto | alpaca | messages | sharegpt | prompt_completion | text | oasst
    columns: dict[str, str] = field(default_factory=dict)  # ours -> the file's
    template: Optional[str] = None  # null: the tokenizer's own; alpaca chatml gemma …; a jinja file
    eval_path: Any = None  # held-out rows, given as `path` is; or a fraction:
    eval_fraction: float = 0.0  # of the rows of `path`, chosen by their content and the seed
    max_rows: Optional[int] = None
    train_on_inputs: bool = False
    train_on_last_turn_only: bool = False
    on_bad_row: str = "error"  # error | skip
    overlong: str = "truncate_right"  # drop | truncate_left | truncate_right | split | error
    sample_by: str = "line"  # of text files: line | paragraph | document
    streaming: bool = False  # read a hub dataset over the network, not from a download
    cache_dir: Optional[str] = None  # of tokenized data; null: ~/.cache/qlora_trainer/tokenized
    num_workers: int = 0  # threads that prepare batches ahead


@dataclass
class TrainConfig:
    # Rows of a micro-batch (packs, when packing). auto: as the plan finds fastest of what fits; then
    # gradient_accumulation_steps counts rows, so a step has the same tokens whatever is chosen. A resumed
    # run keeps what it began with.
    per_device_train_batch_size: int | str = 1
    gradient_accumulation_steps: int = 16
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"  # constant | linear | cosine
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.3
    num_train_epochs: float = 1.0
    max_steps: int = -1  # overrides epochs when positive
    max_length: int = 512  # tokens
    packing: bool = False
    group_by_length: bool = False
    activations: str = "auto"  # auto (the plan's mix) | none | mlp (recompute gate and up) | full (all but
    # down) | offload, full_offload (as mlp and full, with what they keep in host memory)
    base_gemm: str = "bf16"  # bf16 | fp8, opt-in on Hopper and Ada: products with the frozen base in e4m3
    deterministic: bool = False
    logging_steps: int = 1


@dataclass
class OptimConfig:
    name: str = "paged_adamw_32bit"  # paged_adamw_32bit | paged_adamw_8bit | adamw | adamw_8bit |
    # bnb_paged_adamw_32bit (bitsandbytes' own, in managed memory, for comparison)
    resident_gib: Optional[float] = None  # paged state that may stay on the GPU; null: the plan's choice
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class CheckpointConfig:
    save_steps: int = 200
    save_total_limit: int = 2
    resume_from_checkpoint: str = "auto"  # auto | never | a checkpoint folder
    allow_change: list[str] = field(default_factory=list)  # of the run's identity: `train.packing`, `data` …
    keep_best: bool = True  # beside the newest `save_total_limit`, the one with the lowest evaluation loss


@dataclass
class TrackConfig:
    report_to: list[str] = field(default_factory=list)  # wandb
    project: str = "qlora_trainer"


@dataclass
class EvaluateConfig:
    enabled: bool = True
    eval_steps: int = 0  # 0: only at the end
    max_rows: Optional[int] = None
    task: str = "none"  # none | exact_match
    max_new_tokens: int = 128
    batch_size: int = 8  # rows measured, and questions answered, together
    examples: int = 5
    lm_eval_tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, for `evaluate`
    lm_eval_path: Optional[str] = None  # a folder of further tasks, as its YAML


@dataclass
class ChatConfig:
    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0
    system: Optional[str] = None  # opens every conversation


@dataclass
class ExportConfig:
    format: list[str] = field(default_factory=lambda: ["adapter"])  # merged gptq awq rtn int8 nf4 gguf
    adapter: Optional[str] = None  # a PEFT adapter folder that this program did not train, instead of `run`
    merge_base: str = "trained"  # onto the base dequantized as trained against | original: its 16-bit weights
    dtype: str = "auto"  # of merged weights; auto: the base checkpoint's
    bits: int = 4  # gptq, rtn: 3 4 8; awq: 4
    group_size: int = 128  # weights that share a scale; -1: whole rows
    sym: bool = True
    desc_act: bool = False
    gguf_type: str = "q8_0"  # f16 | bf16 | q8_0 | q6_k | q5_k_m | q5_1 | q5_0 | q4_k_m | q4_1 | q4_0
    calibration: str = "train"  # the run's training rows | c4 | wikitext | a file or dataset
    calibration_samples: int = 128
    calibration_length: int = 512  # tokens
    overwrite: bool = False
    verify: bool = True  # reload and measure each export; over its bound: exit 3
    max_kl: Optional[float] = None  # nats a token; null: the format's own bound
    verify_rows: int = 64
    verify_questions: int = 16
    verify_text: Optional[str] = None  # measured on this file instead of the held-out rows
    push_to_hub: Optional[str] = None  # owner/name
    hub_private: bool = True


@dataclass
class PlanConfig:
    gpu: Optional[str] = None  # "24GiB", or the name of a card; null: this machine's
    num_processes: Optional[int] = None  # that the run will be launched with; null: as this command is


@dataclass
class RunConfig:
    recipe: Optional[str] = None
    output_dir: Optional[str] = None  # null: outputs/<recipe>
    seed: int = 42
    run: Optional[str] = None  # evaluate, chat, export, verify: the folder of a finished run
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
