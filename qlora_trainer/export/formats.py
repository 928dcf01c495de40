"""From a trained adapter to a finished folder of each format: files, tokenizer, stop tokens, licence, card.

In: a `Source` (adapter, base, how it was held) and `ExportOptions`. Out: published folders, each with an
`export.json` that says what it was made from. A folder appears whole or not at all; one that was made from
the same adapter with the same settings is kept, so an interrupted export goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.export import bnb, gguf, snippet
from qlora_trainer.export.base import Base
from qlora_trainer.export.card import Card, licence_files, licence_of, render
from qlora_trainer.export.delta import Updates, read_updates
from qlora_trainer.export.fingerprint import sha256, size_on_disk
from qlora_trainer.export.merge import Merge, Progress
from qlora_trainer.export.quantize import METHODS, quantize
from qlora_trainer.export.shards import narrow
from qlora_trainer.export.source import ExportOptions, Source
from qlora_trainer.inference.load import ADAPTER_WEIGHTS, check_base
from qlora_trainer.inference.records import read_json
from qlora_trainer.system import redact
from qlora_trainer.system.disk import publish_folder, require_space, write_json, write_text

FORMATS = ("adapter", "merged", "gptq", "awq", "rtn", "int8", "nf4", "gguf")
RECIPE = "export.json"
_SMALL = 32 << 20  # tokenizer, config, card


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
                gguf.check(self.merge, self.contents, self.options.gguf_type)
            needed += self.needed(kind)
        require_space(self.root, needed, f"exporting {', '.join(formats)} to {self.root}")

    def needed(self, kind: str) -> int:
        """Bytes that exporting takes at its peak, the 16-bit model it may pass through included."""
        if kind == "adapter":
            return size_on_disk(self._adapter) + _SMALL
        # GPTQModel keeps finished layers on the disk until it saves: 2.25 were measured at 4 bits on SmolLM2.
        share = {"merged": 1.0, "int8": 0.75, "nf4": 0.5, "gguf": 1.0}.get(kind, 3.0)
        return int(self.merge.nbytes * share) + _SMALL

    def limits(self, kind: str) -> list[str]:
        """What a format cannot hold of this model, in sentences for the terminal and the card."""
        return gguf.limits(self.merge, self.contents) if kind == "gguf" else []

    @property
    def title(self) -> str:
        """The tuned model's name: its run's."""
        return self.root.resolve().parent.name

    @property
    def contents(self) -> gguf.Contents:
        source = self.source
        return gguf.Contents(self.title, source.name, source.tokenizer, source.stop_ids, source.rows)

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
            "base": self.source.name,
            "base_revision": self.source.revision,
            "base_fingerprint": self.source.base_fingerprint,
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
                self.contents,
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
        for path in work.glob("*config.json"):
            settings = _without_paths(read_json(path), work)
            if path.name == "config.json":
                settings["dtype"] = str(self.merge.dtype).removeprefix("torch.")
            write_json(path, settings)
        shutil.rmtree(work / "quantized")
        shutil.rmtree(passing, ignore_errors=True)

    def _accompany(self, work: Path) -> None:
        """Tokenizer with template, stop tokens and the base's licence, as every export has them."""
        self.source.tokenizer.save_pretrained(str(work))
        folder = self.merge.base.folder
        stored = folder / "generation_config.json"
        # As it stands, but for the ends: the library refuses to save what it reads, such as a temperature
        # without do_sample, which servers take for their default.
        generation = read_json(stored) if stored.is_file() else {}
        generation.pop("_from_model_config", None)  # under which the library takes the ends from config.json
        generation["eos_token_id"] = list(self.source.stop_ids)
        if generation.get("pad_token_id") is None:
            generation["pad_token_id"] = self.source.tokenizer.pad_token_id
        write_json(work / "generation_config.json", generation)
        for path in licence_files(folder):
            shutil.copyfile(path, work / path.name)

    def _card(self, kind: str) -> Card:
        return Card(
            title=f"{self.title}, {kind}",
            base=self.source.name,
            revision=self.source.revision,
            licence=licence_of(Path(self.source.base)),
            made=self._made(kind),
            data=list(self.source.data),
            settings=self.source.settings,
            load=snippet.of_export(kind, self.options.quantize(kind)),
            tags=("qlora", kind),
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
        return " ".join([f"{text}.", *(f"{limit}." for limit in self.limits(kind))])


def _without_paths(value: Any, work: Path) -> Any:
    """`value` without the folders of this machine that a library noted down in it."""
    if isinstance(value, dict):
        kept = {key: _without_paths(item, work) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not _is_inside(item, work)}
    return [_without_paths(item, work) for item in value] if isinstance(value, list) else value


def _is_inside(value: Any, work: Path) -> bool:
    return isinstance(value, str) and str(work.absolute()) in value
