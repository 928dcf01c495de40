"""`verify` passes what is the trained model and fails what is not: each test plants one mistake."""

import json
import shutil
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.evaluate.match import Question
from qlora_trainer.export import probe
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.formats import Exporter
from qlora_trainer.export.judge import BOUNDS, judge, nats
from qlora_trainer.export.merge import Merge
from qlora_trainer.export.source import ExportOptions, Source
from qlora_trainer.export.verify import Sample, Yardstick, markdown, run_probe, verify
from qlora_trainer.inference.records import read_json
from qlora_trainer.model.load import load_base
from qlora_trainer.model.lora import LoraOptions
from tests.export import runs


def sample(count=6):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(6, 250, (24,), generator=generator).tolist() for _ in range(count)]
    return Sample(
        rows=[(row, [False] * 8 + [True] * 16) for row in rows],
        questions=[Question(tuple(rows[0][:8]), "never", "text")],
        source="random rows",
    )


def yardstick(run):
    return Yardstick(
        adapter=run.adapter,
        base=str(run.base),
        trained=read_json(run.adapter / "training.json") | {"stored_quantized": False},
        stop_ids=[run.tokenizer.eos_token_id],
        dtype="float32",
        device="cpu",
    )


def source(run):
    return Source(
        adapter=run.adapter,
        base=str(run.base),
        name="base",
        revision=None,
        held=Held(run.options.method, run.options.double_quant, run.options.dtype),
        tokenizer=run.tokenizer,
        stop_ids=[run.tokenizer.eos_token_id],
    )


def exporter(run, **options):
    return Exporter(source(run), ExportOptions(**options), run.adapter.parent / "exports", runs.CPU, list)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr("qlora_trainer.export.verify.run_probe", runs.probe_here)


def test_planted_wrong_merges_fail_and_the_right_one_passes(tmp_path, here):
    # A small update, as after real training, which quantizing again can swallow.
    run = runs.make(tmp_path, lora=LoraOptions(r=4, lora_alpha=4, dtype=torch.float32), scale=0.05)
    exports = exporter(run)
    right = exports.export("merged")
    root = right.parent
    base = Base(str(run.base), None, source(run).held, runs.CPU)
    updates = read_updates(run.adapter)

    def plant(name, change):
        shutil.copytree(right, root / name)
        path = root / name / "model.safetensors"
        tensors = load_file(path)
        reader = Merge.plan(base, updates).by_shard()
        ((_, shard, pieces),) = list(reader)
        for piece in pieces:
            if piece.parameter in updates.low_rank:
                plain = base.value(shard, piece.stored, piece.parameter)
                tensors[piece.name] = change(plain, tensors[piece.name].float())
        save_file(tensors, path, metadata={"format": "pt"})
        return root / name

    broken = shutil.copytree(right, root / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1000])
    coarse = Held("fp4", True, torch.float32)

    def stale(name):
        """One tensor of an older save, as a left-over shard of the base would bring it: no divergence."""
        shutil.copytree(right, root / name)
        path = root / name / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
        return root / name

    def doubled(name):
        shutil.copytree(right, root / name)
        shutil.copy(root / name / "model.safetensors", root / name / "model-00001-of-00001.safetensors")
        return root / name

    planted = {
        "stale": stale("stale"),
        "doubled": doubled("doubled"),
        "dropped": plant("dropped", lambda plain, tuned: plain),
        "twice": plant("twice", lambda plain, tuned: plain + 2 * (tuned - plain)),
        "requantized": plant("requantized", lambda plain, tuned: coarse.round_trip(tuned)),
    }
    planted = {"broken": broken.parent, **planted}  # before the others, which are measured all the same
    verdicts = verify(yardstick(run), {"merged": right, **planted}, sample(), max_new_tokens=4)
    names = [verdict.name for verdict in verdicts]
    assert names == ["trained model", "base alone", "merged", *planted]
    found = {verdict.name: verdict for verdict in verdicts}
    assert found["merged"].passed and found["merged"].measured["kl"] < 1e-6
    assert found["merged"].measured["top1"] == 1.0
    assert found["base alone"].measured["kl"] > 100 * found["merged"].measured["kl"]
    for name in planted:
        assert not found[name].passed, name
    assert found["merged"].measured["weights"]["tensors"] == 21
    assert found["merged"].measured["texts_differ"] == 0
    assert found["stale"].measured["kl"] < 1e-4
    assert "1 of 21 tensors are not base + adapter, model.norm.weight first" in said(found["stale"])
    assert "no loader reads: model-00001-of-00001.safetensors" in said(found["doubled"])
    assert "cannot be loaded and measured" in found["broken"].failures[0].text
    assert "the tuning is lost" in said(found["dropped"])
    assert found["dropped"].measured["kl"] == pytest.approx(found["base alone"].measured["kl"], abs=1e-5)

    stored = json.loads((planted["twice"] / "verify.json").read_text())["models"]
    assert [model["model"] for model in stored] == ["trained model", "base alone", "twice"]
    assert not stored[2]["passed"] and "model.safetensors" in stored[2]["sha256"]
    assert "**twice failed:**" in (planted["twice"] / "README.md").read_text()
    card = (right / "README.md").read_text()
    assert "| ✓ merged |" in card and "failed" not in card
    assert "| ✗ twice |" in markdown(verdicts, sample())


def test_the_base_alone_is_without_what_was_trained_whole(tmp_path, here):
    """A tuning that `modules_to_save` carries: its merge passes, the base itself is called lost."""
    lora = LoraOptions(r=1, lora_alpha=0.001, modules_to_save=["lm_head"], dtype=torch.float32)
    run = runs.make(tmp_path, lora=lora, scale=0.1)
    exports = exporter(run)
    right = exports.export("merged")
    lost = Exporter(
        replace(source(run), adapter=None), ExportOptions(), tmp_path / "lost", runs.CPU, list
    ).export("merged")
    _, base, merged, base_again = verify(yardstick(run), {"merged": right, "lost": lost}, sample())
    assert merged.passed, said(merged)
    assert base.measured["kl"] > 0.1
    assert "the tuning is lost" in said(base_again)
    assert base_again.measured["kl"] == pytest.approx(base.measured["kl"], abs=1e-5)
    plain = load_base(run.options, runs.CPU)
    nll = [plain(input_ids=torch.tensor([ids]), labels=_labels(ids, m)).loss for ids, m in sample().rows]
    assert base.measured["perplexity"] == pytest.approx(float(torch.stack(nll).mean().exp()), rel=1e-4)


def test_an_nf4_adapter_is_measured_on_the_base_it_learned_on_whatever_the_cpu_would_repack(tmp_path, here):
    run = runs.make(tmp_path, scale=0.01)
    verdict = verify(yardstick(run), {"adapter": exporter(run).export("adapter")}, sample())[-1]
    assert verdict.passed and verdict.measured["max_logit_difference"] < 1e-3
    request = {"kind": "adapter", "folder": str(run.adapter), "base": str(run.base), "device": "cpu"}
    record = read_json(run.adapter / "training.json") | {"stored_quantized": False}
    for kind, folder in (("adapter", run.adapter), ("nf4", exporter(run).export("nf4"))):
        asked = request | {"kind": kind, "folder": str(folder), "dtype": "float32", "trained": record}
        model, _ = probe._load(asked)
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
        assert "support_avx512bf16_for_cpu = False" in (folder / "README.md").read_text()


def _labels(ids, measured):
    return torch.tensor([[i if m else -100 for i, m in zip(ids, measured, strict=True)]])


def said(verdict):
    return " ".join(failure.text for failure in verdict.failures)


MEASURED = {
    "kl": 0.001,
    "max_kl": 0.01,
    "prompt_ids": [1, 2],
    "texts": 4,
    "texts_differ": 0,
    "stopped": 10,
    "stop_ids": [2, 5],
    "weights": {"tensors": 20, "unequal": [], "largest": 0.0, "strays": []},
}
BASE = {"kl": 0.4}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kl": 0.02}, "over the bound"),
        ({"kl": float("nan")}, "over the bound"),
        ({"prompt_ids": [1, 1, 2]}, "conversation into other token ids"),
        ({"prompt_ids": None}, "conversation into other token ids"),
        ({"texts_differ": 3}, "turns 3 of 4 rows into other token ids"),
        ({"stopped": 8}, "ends 8 of 10"),
        ({"stop_ids": [5]}, "does not stop at the tokens 2"),
        ({"weights": MEASURED["weights"] | {"unequal": ["a", "b"]}}, "2 of 20 tensors are not base"),
        ({"weights": MEASURED["weights"] | {"strays": ["old.safetensors"]}}, "no loader reads: old"),
        ({"weights": {"error": "cut short"}}, "cannot be read: cut short"),
    ],
)
def test_each_promise_is_judged(change, word):
    assert judge("merged", MEASURED, MEASURED, BASE, 10) == ()
    failures = judge("merged", MEASURED | change, MEASURED, BASE, 10)
    assert word in " ".join(failure.text for failure in failures)


def test_nearer_to_the_base_is_lost_even_under_the_bound():
    (failure,) = judge("gguf", MEASURED | {"kl": 0.21, "max_kl": 0.5}, MEASURED, BASE, 10)
    assert "tuning is lost" in failure.text


@pytest.mark.parametrize(
    ("kl", "shown"),
    [(0.0, "0.0000"), (0.31234, "0.3123"), (7.4e-5, "7.4e-05"), (2e-9, "0.0000"), (float("nan"), "nan")],
)
def test_a_small_divergence_is_shown_and_noise_is_none(kl, shown):
    assert nats(kl) == shown and nats(-2e-9) == "0.0000"


@pytest.mark.parametrize("kind", BOUNDS)
def test_advice_fits_the_case(kind):
    (over,) = judge(kind, MEASURED | {"kl": 0.02}, MEASURED, BASE, 10)
    assert "export.max_kl" in over.remedy
    (lost,) = judge(kind, MEASURED | {"kl": 0.3, "max_kl": 1.0}, MEASURED, BASE, 10)
    assert "export.max_kl" not in lost.remedy  # it does not lift that test
    for failure in (over, lost):
        assert ("export.calibration" in failure.remedy) == (kind in ("gptq", "awq"))
        assert ("bits" in failure.remedy) == (kind in ("gptq", "awq", "rtn"))
        assert "adapter" not in kind or "base" in failure.remedy


def test_what_cannot_be_measured_is_said(tmp_path):
    run = runs.make(tmp_path)
    with pytest.raises(ConfigError, match="no row with a labelled"):
        verify(yardstick(run), {}, Sample([([1, 2], [True, False])], [], "one row"))
    with pytest.raises(ConfigError, match="no merged export"):
        verify(yardstick(run), {"merged": tmp_path / "none"}, sample())


def test_a_broken_export_is_named(tmp_path):
    run = runs.make(tmp_path)
    folder = exporter(run).export("merged")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    request = {"kind": "merged", "folder": str(folder), "device": "cpu", "dtype": "float32"}
    with pytest.raises(CheckpointError, match=r"merged cannot be loaded and measured: .*"):
        run_probe("merged", request, tmp_path)
