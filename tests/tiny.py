"""Tiny random models and a tiny tokenizer, shared by the tests of every room."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=263,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=5,
    max_position_embeddings=256,
)
GATED = dict(COMMON, intermediate_size=128, num_key_value_heads=2)
ARCHITECTURES: dict[str, dict] = {
    "llama": GATED,
    "mistral": dict(GATED, sliding_window=None),
    "qwen2": GATED,
    "qwen3": dict(GATED, head_dim=16),
    "gemma": dict(GATED, head_dim=16),
    "gemma2": dict(GATED, head_dim=16, sliding_window=32),
    "phi3": GATED,
    "opt": dict(COMMON, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
}


def model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model of about 100k parameters with random weights from `seed`."""
    config = CONFIG_MAPPING[architecture](**(ARCHITECTURES[architecture] | changes))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens (256) behind the specials <pad> <s> </s> <unk> and ChatML's two: 263 with one spare."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def save(folder: Path, architecture: str = "llama", seed: int = 0, **changes: object) -> Path:
    """An ordinary model folder: weights, config and tokenizer."""
    model(architecture, seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
