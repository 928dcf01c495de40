"""From a trained adapter to a finished folder of each format: files, tokenizer, stop tokens, licence, card.

In: a `Source` (adapter, base, how it was held) and `ExportOptions`. Out: published folders, each with an
`export.json` that says what it was made from. A folder appears whole or not at all; one that was made from
the same adapter with the same settings is kept, so an interrupted export goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_trainer.checkpoint.disk import publish_folder, require_space, write_json, write_text
from qlora_trainer.errors import ConfigError
from qlora_trainer.export import bnb, gguf
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.card import Card, licence_files, licence_of, render
from qlora_trainer.export.delta import Updates, read_updates
from qlora_trainer.export.fingerprint import sha256, size_on_disk
from qlora_trainer.export.merge import Merge, Progress
from qlora_trainer.export.quantize import METHODS, QuantizeOptions, quantize
from qlora_trainer.export.shards import narrow
from qlora_trainer.inference.load import ADAPTER_WEIGHTS, check_base, read_json
from qlora_trainer.system import redact

FORMATS = ("adapter", "merged", "gptq", "awq", "rtn", "int8", "nf4", "gguf")
RECIPE = "export.json"
_SMALL = 32 << 20  # tokenizer, config, card


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        adapter: its folder; None for a base by itself, to be converted.
        base: hub name or folder of the base.
        held: how training held the base.
        stop_ids: that end an answer.
        data, settings: for the card.
    """

    adapter: Path | None
    base: str
    revision: str | None
    held: Held
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    data: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportOptions:
    """How to export; the fields are the keys of the `export` section.

    Attributes:
        merge_base: trained | original.
        dtype: of merged weights; None is the base's own.
        bits, group_size, sym, desc_act: for gptq, awq and rtn.
        gguf_type: f16 | bf16 | q8_0 | q6_k | q5_k_m | q5_1 | q5_0 | q4_k_m | q4_1 | q4_0.
        calibration, calibration_samples, calibration_length: what gptq and awq watch activations on.
        overwrite: replace a folder made from another adapter or with other settings.
    """

    merge_base: str = "trained"
    dtype: torch.dtype | None = None
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    gguf_type: str = "q8_0"
    calibration: str = "train"
    calibration_samples: int = 128
    calibration_length: int = 512
    overwrite: bool = False

    def quantize(self, method: str) -> QuantizeOptions:
        return QuantizeOptions(method, self.bits, self.group_size, self.sym, self.desc_act)


class Exporter:
    """Exports one adapter into folders below `root`.

    Args:
        calibration: sequences of token ids for GPTQ and AWQ, made when first needed.
        device: where to merge and quantize.
        progress: format -> a callback for (done, total).
    """

    def __init__(
        self,
        source: Source,
        options: ExportOptions,
        root: Path,
        device: torch.device,
        calibration: Callable[[], Sequence[Sequence[int]]],
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self.source, self.options, self.root, self.device = source, options, root, device
        self.calibration, self.progress = calibration, progress
        self._merge: Merge | None = None

    @property
    def merge(self) -> Merge:
        """The merge all formats but the adapter start from."""
        if self._merge is None:
            held = self.source.held if self.options.merge_base == "trained" else None
            base = Base(self.source.base, self.source.revision, held, self.device)
            updates = Updates() if self.source.adapter is None else read_updates(self.source.adapter)
            self._merge = Merge.plan(base, updates, self.options.dtype)
        return self._merge

    def check(self, formats: Sequence[str]) -> None:
        """Everything that can be refused before the first byte is written.

        Raises:
            ConfigError, CheckpointError, MissingInputError: see the rooms; also a full disk and
                folders that exist and are something else.
        """
        if self.source.adapter is not None:
            check_base(self.source.adapter, self.source.base, self.source.revision)
        needed = 0
        for kind in formats:
            assert kind in FORMATS, kind
            if kind == "adapter" and self.source.adapter is None:
                raise ConfigError("export.format=adapter: there is none; name a run or export.adapter=FOLDER")
            if self.finished(kind):
                continue
            if self.folder(kind).exists() and not self.options.overwrite:
                raise ConfigError(
                    f"{self.folder(kind)} exists and was made from another adapter or with other settings: "
                    "move it away, or set export.overwrite=true to replace it"
                )
            if kind in METHODS:
                linears = {name: self.merge.base.parameters[name] for name in self.merge.base.linears}
                self.options.quantize(kind).check(linears)
                if kind != "rtn":
                    self.calibration()
            elif kind == "gguf":
                gguf.check(self.merge, self.source.tokenizer, self.options.gguf_type)
            needed += self.needed(kind)
        require_space(self.root, needed, f"exporting {', '.join(formats)} to {self.root}")

    def needed(self, kind: str) -> int:
        """Bytes that exporting takes at its peak, the 16-bit model it may pass through included."""
        if kind == "adapter":
            return size_on_disk(self._adapter) + _SMALL
        # GPTQModel keeps finished layers on the disk until it saves: 2.25 were measured at 4 bits on SmolLM2.
        share = {"merged": 1.0, "int8": 0.75, "nf4": 0.5, "gguf": 1.0}.get(kind, 3.0)
        return int(self.merge.nbytes * share) + _SMALL

    @property
    def _adapter(self) -> Path:
        assert self.source.adapter is not None, "refused by check"
        return self.source.adapter

    def folder(self, kind: str) -> Path:
        return self.root / kind

    def log(self, kind: str) -> Path:
        """What a library printed; outside the folder, so that it is there to be read after a failure."""
        return self.root / f"{kind}.log"

    def finished(self, kind: str) -> bool:
        """Whether that folder is there and was made from this adapter with these settings."""
        path = self.folder(kind) / RECIPE
        return path.is_file() and read_json(path) == redact.tree(self.recipe(kind))

    def recipe(self, kind: str) -> dict[str, Any]:
        """What the folder depends on; equal recipes give equal folders."""
        recipe: dict[str, Any] = {
            "format": kind,
            "adapter_sha256": None
            if self.source.adapter is None
            else sha256(self._adapter / ADAPTER_WEIGHTS),
            "base": self.source.base,
            "base_revision": self.source.revision,
        }
        if kind != "adapter":
            recipe |= {
                "merge_base": self.options.merge_base,
                "held": self.source.held.method,
                "dtype": str(self.merge.dtype).removeprefix("torch."),
            }
        if kind in METHODS:
            recipe |= asdict(self.options.quantize(kind))
        if kind in ("gptq", "awq"):
            names = ("calibration", "calibration_samples", "calibration_length")
            recipe |= {name: getattr(self.options, name) for name in names}
        if kind == "gguf":
            recipe["gguf_type"] = self.options.gguf_type
        return recipe

    def export(self, kind: str) -> Path:
        """Makes the folder of one format, or keeps a finished one; returns it."""
        if self.finished(kind):
            return self.folder(kind)
        try:
            folder = publish_folder(
                self.folder(kind), lambda work: self._fill(kind, work), needed=self.needed(kind)
            )
        except KeyboardInterrupt:  # nothing failed: there is nothing to read up
            self.log(kind).unlink(missing_ok=True)
            raise
        self.log(kind).unlink(missing_ok=True)
        return folder

    def _fill(self, kind: str, work: Path) -> None:
        progress = self.progress(kind) if self.progress is not None else None
        if kind == "adapter":
            shutil.copytree(self._adapter, work, dirs_exist_ok=True)
        elif kind == "merged":
            self.merge.write(work, progress)
        elif kind in ("int8", "nf4"):
            bnb.write(self.merge, work, kind, progress)
        elif kind == "gguf":
            name = f"model-{self.options.gguf_type}.gguf"
            gguf.write(
                self.merge,
                self.source.tokenizer,
                work / name,
                self.options.gguf_type,
                self.log(kind),
                progress,
            )
        else:
            self._quantize(kind, work, progress)
        if kind != "adapter":
            self._accompany(work)
        if kind != "adapter" or not (work / "README.md").is_file():
            write_text(work / "README.md", render(self._card(kind)))
        write_json(work / RECIPE, self.recipe(kind))

    def _quantize(self, kind: str, work: Path, progress: Progress | None) -> None:
        merged = self.folder("merged")
        passing = work / "merged"  # a 16-bit model on the way, unless it is exported anyway
        if not self.finished("merged"):
            merged = passing
            merged.mkdir()
            self.merge.write(merged)
            self._accompany(merged)
        quantize(
            merged,
            work / "quantized",
            self.options.quantize(kind),
            [] if kind == "rtn" else self.calibration(),
            self.merge.base.config.num_hidden_layers,
            self.device.type,
            self.log(kind),
            progress,
        )
        for path in (work / "quantized").iterdir():
            # The library rewrites tokenizer and generation config to its own taste; ours come later.
            if path.suffix == ".safetensors":
                # On a CPU it works in float32; embeddings and norms would stay so, twice their size, and
                # 4-bit kernels refuse a model whose config says float32.
                narrow(path, work / path.name, self.merge.dtype)
            elif path.name.endswith("config.json") or "index" in path.name:
                path.rename(work / path.name)
        config = read_json(work / "config.json")
        write_json(work / "config.json", config | {"dtype": str(self.merge.dtype).removeprefix("torch.")})
        shutil.rmtree(work / "quantized")
        shutil.rmtree(passing, ignore_errors=True)

    def _accompany(self, work: Path) -> None:
        """Tokenizer with template, stop tokens and the base's licence, as every export has them."""
        self.source.tokenizer.save_pretrained(str(work))
        folder = self.merge.base.folder
        stored = folder / "generation_config.json"
        config = GenerationConfig.from_pretrained(folder) if stored.is_file() else GenerationConfig()
        config.eos_token_id = list(self.source.stop_ids)
        if config.pad_token_id is None:
            config.pad_token_id = self.source.tokenizer.pad_token_id
        config.save_pretrained(work)
        for path in licence_files(folder):
            shutil.copyfile(path, work / path.name)

    def _card(self, kind: str) -> Card:
        return Card(
            title=f"{self.root.resolve().parent.name}, {kind}",
            base=self.source.base,
            revision=self.source.revision,
            licence=licence_of(Path(self.source.base)),
            made=self._made(kind),
            data=list(self.source.data),
            settings=self.source.settings,
            load=self._loading(kind),
            tags=("qlora", kind),
        )

    def _loading(self, kind: str) -> str:
        if kind not in METHODS:
            return _LOADING.get(kind, _PLAIN)
        options = self.options.quantize(kind)
        settings, backend = options.gpu_kernel
        return (
            f"{_PLAIN}# where the kernel it picks for your GPU does not suit this model, name another:\n"
            f"# quantization_config={settings}(bits={options.bits}, backend={backend!r})\n"
        )

    def _made(self, kind: str) -> str:
        if kind == "adapter":
            return "A LoRA adapter (PEFT)."
        on = (
            f"the base as it was trained against ({self.source.held.method}, dequantized exactly)"
            if self.options.merge_base == "trained" and self.source.held.method != "none"
            else "the original weights of the base"
        )
        stored = f"stored as {self.recipe(kind)['dtype']}"
        text = f"A QLoRA adapter merged onto {on}, in float32 arithmetic, {stored}"
        if self.source.adapter is None:
            text = f"The base without adapter, {stored}"
        if kind in METHODS:
            text += f", then quantized: {self.options.quantize(kind).in_words}"
        elif kind != "merged":
            text += f", then converted to {kind}"
        return text + "."


_PLAIN = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    "model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')\n"
    "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
)
_LOADING = {
    "gguf": "# with llama.cpp\n# llama-cli -m FOLDER/model-*.gguf -cnv\n",
    "adapter": (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n"
    ),
}
