"""One model, measured in a process of its own: loaded from its files alone, by the loader of its kind.

In: a request (JSON) naming the folder, the rows and where the trained model's logits are. Out: a result
(JSON) with divergence, perplexity, answers and timings. `verify` runs it once for every model, the
trained one first (or the plain base, where nothing was trained): that run writes the logits all others
are compared with, says which texts they must turn into which ids, and compares merged exports with its own
weights. Exports are loaded by plain transformers and PEFT, with what their card says must be done beside.

Run as `python -m qlora_trainer.export.probe request.json result.json`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import QLoRAError
from qlora_trainer.export.quantize import QuantizeOptions
from qlora_trainer.export.reader import FolderReader, Reader, reader_of
from qlora_trainer.model.limits import limits_of
from qlora_trainer.system.processes import shield_worker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
YARDSTICKS = ("trained", "plain")


@dataclass(frozen=True)
class Row:
    """A held-out row: token ids [T] and which of them the model is measured on predicting, bool [T]."""

    ids: list[int]
    measured: list[bool]

    @property
    def positions(self) -> list[int]:
        """Where a measured token is predicted: the position before it."""
        return [t - 1 for t in range(1, len(self.ids)) if self.measured[t]]


def main(request_path: str, result_path: str) -> None:
    """Measures what the request asks for and writes the result."""
    request: dict[str, Any] = json.loads(Path(request_path).read_text(encoding="utf-8"))
    import peft  # noqa: F401  # importing libraries is no part of loading a model
    import transformers  # noqa: F401

    started = time.perf_counter()
    model, reader = _load(request)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    rows = [Row(row["ids"], row["measured"]) for row in request["rows"]]
    yardstick = request["kind"] in YARDSTICKS
    if yardstick:
        # before the first forward, which may move quantized weights about
        result["weights"] = {name: _weights(model, Path(f)) for name, f in request["merged"].items()}
        result["texts"] = _texts(reader, rows)
    else:
        wrong = sum(reader.encode(t["text"], t["prefixed"]) != t["ids"] for t in request["texts"])
        result |= {"texts": len(request["texts"]), "texts_differ": wrong}
    result |= _divergence(model, rows, Path(request["logits"]), writes=yardstick)
    result["prompt_ids"] = reader.prompt(request["conversation"])
    result |= _answers(model, reader, request)
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _load(request: dict[str, Any]) -> tuple[Any, Reader]:
    """The model by the loader of its kind, and the tokenizer that lies beside it."""
    from transformers import AutoModelForCausalLM

    from qlora_trainer.inference.load import fit_embeddings, load, load_base_alone
    from qlora_trainer.model.load import keep_unpacked
    from qlora_trainer.model.skeleton import read_configuration

    kind, folder, device = request["kind"], Path(request["folder"]), request["device"]
    if kind == "trained":  # as the trainer held it: the yardstick, not an export
        loaded = load(folder, base=request["base"], device=device)
        return loaded.model, FolderReader(folder, loaded.tokenizer)
    if kind == "base":
        loaded = load_base_alone(folder, base=request["base"], device=device)
        return loaded.model, FolderReader(folder, loaded.tokenizer)
    dtype = DTYPES[request["dtype"]]
    if kind == "adapter":
        from peft import PeftModel

        arguments = _base_arguments(request["trained"])
        if not request["trained"]["stored_quantized"]:  # whatever its config.json says
            arguments["config"] = read_configuration(request["base"], request["trained"].get("revision"))
        model: Any = AutoModelForCausalLM.from_pretrained(
            request["base"], dtype=dtype, device_map={"": device}, **arguments
        )
        fit_embeddings(model, folder)
        model = PeftModel.from_pretrained(model, folder)
    elif kind == "gguf":
        from transformers import GgufConfig

        (file,) = folder.glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        ).to(device)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **kernel(folder, device)
        )
    keep_unpacked(model)
    return model.eval(), reader_of(folder)


def kernel(folder: Path, device: str) -> dict[str, Any]:
    """What to tell `from_pretrained` so that a GPTQ or AWQ export runs on a GPU, whatever its widths."""
    import transformers

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    method, bits = stored.get("quant_method"), stored.get("bits")
    if device != "cuda" or method not in ("gptq", "awq"):
        return {}
    settings, backend = QuantizeOptions(method, bits).gpu_kernel
    return {"quantization_config": getattr(transformers, settings)(bits=bits, backend=backend)}


def _base_arguments(trained: dict[str, Any]) -> dict[str, Any]:
    """How the adapter's card says the base is to be loaded."""
    from transformers import BitsAndBytesConfig

    if trained.get("revision"):
        return {"revision": trained["revision"], **_base_arguments({**trained, "revision": None})}
    if trained["method"] in ("nf4", "fp4") and not trained["stored_quantized"]:
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=trained["method"],
                bnb_4bit_use_double_quant=trained["double_quant"],
                bnb_4bit_compute_dtype=DTYPES[trained["compute_dtype"]],
            )
        }
    if trained["method"] == "int8" and not trained["stored_quantized"]:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {}


def _weights(model: Any, folder: Path) -> dict[str, Any]:
    """What `equality.compare` found of a merged export; `error` where it cannot be read."""
    from qlora_trainer.export.equality import compare

    try:
        return compare(model, folder).as_dict()
    except QLoRAError as error:
        return {"error": str(error)}


def _texts(reader: Reader, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as text, with the ids that every export must turn it into.

    Not every row is a text: one may be cut within a letter, or begin its answer as a text of its own. What
    the trained model's tokenizer does not turn into the row's ids is left out.
    """
    from qlora_trainer.data.encode import prefix_ids

    found, prefix = [], prefix_ids(reader.tokenizer)
    for row in rows:
        prefixed = bool(prefix) and row.ids[: len(prefix)] == prefix
        own = row.ids[len(prefix) if prefixed else 0 :]
        text = str(
            reader.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        if reader.encode(text, prefixed) == row.ids:
            found.append({"text": text, "prefixed": prefixed, "ids": row.ids})
    return found


@torch.inference_mode()
def _divergence(model: Any, rows: list[Row], logits: Path, writes: bool) -> dict[str, Any]:
    """KL(trained ‖ this) in nats a token, top-1 agreement, perplexity and the largest logit difference.

    One row's logits are in memory at a time, float32 [positions, vocabulary]; sums are float64.
    """
    nll = kl = 0.0
    tokens = agree = 0
    largest = 0.0
    for number, row in enumerate(rows):
        ids = torch.tensor([row.ids], device=model.device)
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0, row.positions].float().cpu()
        log_p = found.log_softmax(-1)
        targets = torch.tensor([row.ids[t + 1] for t in row.positions])
        nll -= float(log_p.gather(1, targets[:, None]).double().sum())
        tokens += len(targets)
        path = logits / f"{number}.safetensors"
        if writes:
            save_file({"logits": found.contiguous()}, path)
            continue
        reference = load_file(path)["logits"]
        width = min(reference.shape[1], found.shape[1])  # a padded vocabulary has rows nobody trained
        log_q = reference[:, :width].log_softmax(-1)
        log_p = found[:, :width].log_softmax(-1)
        kl += float((log_q.exp() * (log_q - log_p)).double().sum())
        agree += int((reference.argmax(-1) == found.argmax(-1)).sum())
        largest = max(largest, float((reference[:, :width] - found[:, :width]).abs().max()))
    measured: dict[str, Any] = {"tokens": tokens, "perplexity": math.exp(min(nll / tokens, 700.0))}
    if not writes:
        measured |= {"kl": kl / tokens, "top1": agree / tokens, "max_logit_difference": largest}
    return measured


def _answers(model: Any, reader: Reader, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers to the questions with the stop tokens of the files, and how fast they came.

    One prompt at a time: padding would add its own rounding to the comparison.
    """
    stops = reader.stops() or request["stop_ids"]
    texts, stopped, made, seconds = [], 0, 0, 0.0
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt], device=model.device)
        room = limits_of(model).room(len(prompt), request["max_new_tokens"])
        if not room:
            texts.append("")
            continue
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[0, len(prompt) :].tolist()
        seconds += time.perf_counter() - started
        made += len(output)
        stopped += output[-1] in stops
        texts.append(reader.tokenizer.decode(output, skip_special_tokens=True))
    speed = made / seconds if seconds else None
    return {"answers": texts, "stopped": stopped, "stop_ids": stops, "tokens_per_second": speed}


if __name__ == "__main__":
    shield_worker()
    main(*sys.argv[1:])
