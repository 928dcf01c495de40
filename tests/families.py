"""Every causal language model type of the installed transformers, tiny, and what becomes of it here.

`tiny_config(model_type)` shrinks the type's own defaults by the names of their fields; `outcome` plans such
a model, trains it for two steps and reloads its adapter. `scripts/families` makes its table from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, QLoRAError
from qlora_trainer.model.forward import ReferenceForward
from qlora_trainer.model.fuse import fuse
from qlora_trainer.model.fused.describe import describe_model
from qlora_trainer.model.linears import percent, quantized_share
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.outline import outline_adapted
from qlora_trainer.model.skeleton import read_configuration
from qlora_trainer.objectives.sft import sft
from qlora_trainer.optim import make_optimizer
from qlora_trainer.plan import hardware
from qlora_trainer.plan.architecture import Architecture
from qlora_trainer.plan.plan import make_plan
from tests.batches import collate, documents

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CPU = torch.device("cpu")
LONGEST = 240  # characters of a reason
HIDDEN, HEADS, HEAD, VOCABULARY = 64, 4, 16, 96  # 64: bitsandbytes' narrowest 4-bit weight on a CPU

NAMES: dict[int, str] = {  # value -> fields that get it
    HIDDEN: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size"
    " output_embedding_size word_embed_proj_dim moe_intermediate_size hidden_size_per_layer_input"
    " expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size attention_hidden_size lru_width dense_intermediate_size mamba_d_ssm"
    " backbone_hidden_size hidden_size_global dim_model_base pronunciation_embed_dim shape_embed_dim"
    " ple_embed_dim router_hidden_size q_lora_rank kv_lora_rank o_lora_rank adapter_rank laurel_rank"
    " hc_lowrank gated_norm_rank block_multiple_of max_source_positions rel_extent",
    2 * HIDDEN: "intermediate_size ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size encoder_ffn_dim"
    " decoder_ffn_dim feed_forward_size intermediate_size_mlp",
    VOCABULARY: "vocab_size vocab_size_per_layer_input audio_vocab_size pronunciation_vocab_size"
    " shape_vocab_size",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions context_length"
    " encoder_hash_byte_group_vocab",
    HEADS: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"
    " decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads"
    " linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads"
    " swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num",
    2: "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers"
    " num_encoder_layers num_decoder_layers num_layers_per_stack num_key_value_heads num_kv_heads"
    " swa_num_key_value_heads linear_num_key_heads num_query_groups num_experts_per_tok"
    " num_experts_per_token moe_k moe_topk top_k_experts",
    1: "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_shared_experts"
    " moe_num_shared_experts num_dense_layers moe_layer_end_index mamba_n_groups mamba_ngroups n_groups"
    " num_nextn_predict_layers num_mem_blocks split_ngram_parts",
    0: "num_kv_shared_layers",
    HEAD: "head_dim d_head dim_head attention_head_dim attention_head_size index_head_dim kv_channels"
    " linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim swa_head_dim qk_nope_head_dim"
    " query_pre_attn_scalar mamba_headdim mamba_d_head mamba_head_dim d_rel mamba_d_state state_size"
    " ssm_state_size chunk_size mamba_chunk_size sliding_window attention_window_size window_size"
    " local_attention sliding_window_size mamba_dt_rank time_step_rank attention_chunk_size block_size"
    " index_topk ngram_vocab_size_base make_ngram_vocab_size_divisible_by lsh_attn_chunk_length"
    " local_attn_chunk_length",
    HEAD // 2: "qk_rope_head_dim rotary_dim",
    HEAD + HEAD // 2: "qk_head_dim",
}
SIZES = {name: value for value, names in NAMES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_MIXED = ["sliding_attention", "full_attention"]


def _each(model_types: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {model_type: values for model_type in model_types.split()}


SPECIAL: dict[str, dict[str, Any]] = {  # what names alone do not say
    **_each("axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3", num_key_value_heads=HEADS),
    **_each("axk1 deepseek_v3 kimi_linear youtu", num_key_value_heads=HEADS, head_dim=HEAD // 2),
    **_each("deepseek_v2", num_key_value_heads=HEADS, head_dim=HEAD // 2, num_experts_per_tok=2),
    **_each("longcat_flash", num_key_value_heads=HEADS, head_dim=HEAD // 2, zero_expert_num=2),
    **_each("hunyuan_v1_dense hunyuan_v1_moe ministral", head_dim=HEAD),
    **_each("nemotron", head_dim=HEAD, num_key_value_heads=2),
    **_each(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta"
        " roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
        is_decoder=True,
    ),
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": dict.fromkeys(_MIXED, _ROPE)},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {"intermediate_size": [2 * HIDDEN] * 2, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": {"layer_types": _MIXED, "per_layer_config": {"01": {"head_dim": 2 * HEAD}}},
    "gemma4_unified_text": {"layer_types": _MIXED, "per_layer_config": {"01": {"head_dim": 2 * HEAD}}},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "laguna": {"num_attention_heads_per_layer": [HEADS, HEADS]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "qwen_sparse_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
    },
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD, "use_mamba_kernels": False,
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 2 * HIDDEN, "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """About 100k parameters; raises what transformers does where a type has no defaults."""
    return CONFIG_MAPPING[model_type](**_shrunk(CONFIG_MAPPING[model_type](), model_type) | changes)


def _shrunk(config: PreTrainedConfig, model_type: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    plain = config.to_dict()
    layers = next((plain[name] for name in LAYERS if isinstance(plain.get(name), int)), 0)
    for name, value in plain.items():
        inner = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(inner, PreTrainedConfig):
            values[name] = {"model_type": inner.model_type} | _shrunk(inner, inner.model_type)
        elif name in SIZES and isinstance(value, int | float):
            values[name] = SIZES[name]
        elif name.endswith("token_id") and value is not None:
            values[name] = min(value, 5) if isinstance(value, int) else [5]
        elif isinstance(value, list) and len(value) == layers > 2:  # one for each layer
            kinds = list(dict.fromkeys(value))
            values[name] = [kinds[0], kinds[-1]]
    return values | SPECIAL.get(model_type, {})


@dataclass(frozen=True)
class Outcome:
    """One line of the table. `path`: fast, reference or refused; `why`: not fast."""

    model_type: str
    path: str
    quantized: str
    why: str

    def line(self) -> str:
        """Of a Markdown table."""
        return f"| {self.model_type} | {self.path} | {self.quantized} | {self.why.replace('|', '/')} |"


def outcome(model_type: str, folder: Path) -> Outcome:
    """Plans, trains and reloads; asserts that plan and run agree."""
    make_model(model_type, folder)
    for method, allowed in (("nf4", False), ("nf4", True), ("none", True)):
        try:
            return _trained(model_type, folder, method, allowed)
        except QLoRAError as error:
            why = error
            assert error.exit_code in (2, 66) and "\n" not in str(error)
            if not isinstance(error, ConfigError) or not str(error).startswith("quantization.method"):
                break
    said = str(why).replace(str(folder), "FOLDER")
    return Outcome(model_type, "refused", "", said if len(said) < LONGEST else f"{said[:LONGEST]} …")


@torch.no_grad()
def _logits(model: PeftModel) -> torch.Tensor:
    training = model.training
    logits = model.eval()(input_ids=torch.arange(6, 14)[None], use_cache=False).logits
    model.train(training)
    return logits


def make_model(model_type: str, folder: Path, **changes: Any) -> None:
    """A model folder with random weights, or with a config.json alone where transformers cannot build it."""
    try:
        config = tiny_config(model_type, **changes)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        described = json.loads((folder / "config.json").read_text())
        if described["model_type"] != model_type:  # the published one has the text's inside
            described = config.to_dict()
    except Exception:  # what is tested is what this program says of it
        folder.mkdir(exist_ok=True)
        described = {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(described, default=str))


def _trained(model_type: str, folder: Path, method: str, allowed: bool) -> Outcome:
    run = RunConfig()
    run.model.model_name_or_path = str(folder)
    run.quantization.method, run.quantization.allow_partial = method, allowed
    run.lora.r, run.lora.dtype = 4, "float32"
    config = json.loads((folder / "config.json").read_text())
    plan = make_plan(run, hardware.detect("cpu", folder), Architecture(config, folder))

    options, lora = BaseOptions(str(folder), method=method), LoraOptions(r=4, dtype=torch.float32)
    load = partial(load_base, options, CPU, lambda line: None)
    base = load()
    assert plan.share == quantized_share(base)
    model = attach(base, lora, seed=0).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert plan.trainable == sum(p.numel() for p in trained.values())
    outline = outline_adapted(read_configuration(str(folder)), options, lora, "cpu")
    assert describe_model(outline) == describe_model(model)
    forward, report = fuse(model, activations=plan.policies)
    assert plan.path == ("fast" if report.fused and not report.fallbacks else "reference")
    if isinstance(forward, ReferenceForward):
        forward.check()
    optimizer = make_optimizer("adamw", model.named_parameters())
    batch = collate([[d] for d in documents([13, 9, 17], vocab=90)], supervised_from=3)
    logits_before = _logits(model)
    for _ in range(2):
        (sft(forward(batch)) / batch.n_supervised).backward()
        optimizer.step(lr=0.01)
        optimizer.zero_grad()
    logits = _logits(model)
    assert logits.isfinite().all() and not torch.equal(logits, logits_before), "two steps change nothing"
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(), folder / "adapter", autocast_adapter_dtype=False)
    assert torch.equal(logits, _logits(again)), "the adapter that was reloaded is another"
    quantized = percent(plan.share.of_body) if method != "none" else "none on a CPU"
    return Outcome(model_type, plan.path, quantized, plan.reference_because or plan.head_because or "")
