"""The adapter as a folder that plain PEFT loads, with everything that makes it talk as it was trained.

    adapter/
      adapter_model.safetensors adapter_config.json    PEFT's own
      tokenizer… chat_template.jinja                   as used in training
      generation_config.json                           the stop tokens
      training.json                                    how the base was held, how much of it quantized
                                                       (elements of what was not, by name), its fingerprint
      README.md                                        the model card

In: the trained PeftModel, its tokenizer and plain values. Out: the folder, whole or not at all.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_trainer.export import snippet
from qlora_trainer.export.card import Card, licence_files, licence_of, render
from qlora_trainer.export.source import Rows
from qlora_trainer.inference.load import ADAPTER_WEIGHTS, dtype_name
from qlora_trainer.inference.records import TRAINED_WITH
from qlora_trainer.inference.stop import pad_id, stop_ids
from qlora_trainer.model.fingerprint import base_fingerprint
from qlora_trainer.model.linears import quantized_share
from qlora_trainer.model.load import BaseOptions
from qlora_trainer.model.residual import adapter_settings, published_tensors
from qlora_trainer.model.source import BUILTIN, resolve
from qlora_trainer.system import redact
from qlora_trainer.system.disk import publish_folder, write_json, write_text


@dataclass(frozen=True)
class TrainedOn:
    """How the base was held while the adapter learned; enough to hold it so again.

    Attributes:
        model_name_or_path: hub name, folder or `builtin:…`.
        source: what `from_pretrained` takes: hub name or folder.
        method: nf4 | fp4 | int8 | gptq | awq | none.
        dtype, compute_dtype: `bfloat16`, `float32` …
        device: cpu | cuda, where it was quantized.
    """

    model_name_or_path: str
    source: str
    revision: str | None
    method: str
    double_quant: bool
    dtype: str
    compute_dtype: str
    device: str

    @classmethod
    def with_options(cls, options: BaseOptions, device: torch.device) -> TrainedOn:
        """What was asked of `load_base`; a folder by its absolute path."""
        source = resolve(options.name_or_path, options.revision)
        return cls(
            model_name_or_path=options.name_or_path if options.name_or_path.startswith(BUILTIN) else source,
            source=source,
            revision=options.revision,
            method=options.method,
            double_quant=options.double_quant,
            dtype=dtype_name(options.dtype),
            compute_dtype=dtype_name(options.compute_dtype),
            device=device.type,
        )

    def __str__(self) -> str:
        double = self.double_quant and self.method in ("nf4", "fp4")
        return self.method + (" with double quantization" if double else "")


def export_adapter(
    model: peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trained: TrainedOn,
    *,
    chat_template: str | None = None,
    data: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    measured: str = "",
    title: str | None = None,
    rows: Rows | None = None,
) -> Path:
    """Publishes `folder`, replacing one of that name, and returns it.

    Args:
        chat_template: the Jinja text that training rendered with, if not the tokenizer's own.
        data: names of the data, for the card.
        settings: the run's configuration as nested plain values, for the card.
        measured: a Markdown table for the card.
        rows: what the training rows are like, for formats that cannot hold all of it.

    Raises:
        CheckpointError: the disk refused; nothing is left behind.
    """
    state = {name: tensor.contiguous() for name, tensor in published_tensors(model).items()}
    base = cast(PreTrainedModel, model.get_base_model())
    share = quantized_share(base)
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    stops = stop_ids(tokenizer, base.generation_config)
    name = snippet.base_name(trained.model_name_or_path)
    held = f" ({share})" if trained.method != "none" and share.left else ""
    card = Card(
        title=title or folder.resolve().parent.name,
        base=name,
        revision=trained.revision,
        licence=licence_of(Path(trained.source)),
        made=(
            f"A LoRA adapter (PEFT), trained with QLoRA: the base stayed frozen, held as {trained}{held}, "
            f"computing in {trained.compute_dtype}."
        ),
        data=data or [],
        settings=settings or {},
        load=snippet.of_adapter(name, trained),
        tags=("qlora", "lora", "peft"),
        library="peft",
    )

    def fill(work: Path) -> None:
        save_file(state, work / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _peft_config(model, trained).save_pretrained(str(work))
        tokenizer.save_pretrained(str(work))
        GenerationConfig(
            eos_token_id=stops, bos_token_id=tokenizer.bos_token_id, pad_token_id=pad_id(tokenizer, stops)
        ).save_pretrained(work)
        record = asdict(trained) | {
            "quantized": share.of_body,
            "not_quantized": dict(share.left),
            "base_fingerprint": base_fingerprint(trained.source, trained.revision),
            "rows": asdict(rows or Rows()),
        }
        write_json(work / TRAINED_WITH, record)
        write_text(work / "README.md", render(card, measured))
        for licence in licence_files(Path(trained.source)):
            shutil.copyfile(licence, work / licence.name)

    size = sum(tensor.nbytes for tensor in state.values())
    return publish_folder(folder, fill, needed=size + (32 << 20))  # tokenizers are some MB


def _peft_config(model: peft.PeftModel, trained: TrainedOn) -> peft.PeftConfig:
    """A copy for disk: the true base, ready for inference, and the same bytes from every process."""
    config = adapter_settings(model)
    for name, value in vars(config).items():
        if isinstance(value, set):  # PEFT would write it in the order of this process's hashes
            setattr(config, name, sorted(value))
    config.base_model_name_or_path = redact.text(trained.source)
    config.revision = trained.revision
    config.inference_mode = True
    return config
