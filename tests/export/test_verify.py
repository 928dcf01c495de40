"""`verify` passes what is the trained model and fails what is not: each test plants one mistake."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.evaluate.match import Question
from qlora_trainer.export.base import Base, Held
from qlora_trainer.export.delta import read_updates
from qlora_trainer.export.formats import Exporter, ExportOptions, Source
from qlora_trainer.export.merge import Merge
from qlora_trainer.export.verify import Sample, Yardstick, judge, markdown, run_probe, verify
from qlora_trainer.inference.load import read_json
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
        revision=None,
        held=Held(run.options.method, run.options.double_quant, run.options.dtype),
        fingerprint=read_json(run.adapter / "training.json")["base_fingerprint"],
        tokenizer=run.tokenizer,
        stop_ids=[run.tokenizer.eos_token_id],
    )


def exporter(run, **options):
    return Exporter(source(run), ExportOptions(**options), run.adapter.parent / "exports", runs.CPU, list)


def test_planted_wrong_merges_fail_and_the_right_one_passes(tmp_path):
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
    planted = {
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
    assert "cannot be loaded and measured" in found["broken"].failures[0]
    assert "the tuning is lost" in " ".join(found["dropped"].failures)
    assert found["dropped"].measured["kl"] == pytest.approx(found["base alone"].measured["kl"], abs=1e-5)

    stored = json.loads((planted["twice"] / "verify.json").read_text())["models"]
    assert [model["model"] for model in stored] == ["trained model", "base alone", "twice"]
    assert not stored[2]["passed"] and "model.safetensors" in stored[2]["sha256"]
    assert "**twice failed:**" in (planted["twice"] / "README.md").read_text()
    card = (right / "README.md").read_text()
    assert "| ✓ merged |" in card and "failed" not in card
    assert "| ✗ twice |" in markdown(verdicts, sample())


MEASURED = {"kl": 0.001, "prompt_ids": [1, 2], "stopped": 10, "stop_ids": [2, 5]}
BASE = {"kl": 0.4}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kl": 0.02}, "over the bound"),
        ({"kl": float("nan")}, "over the bound"),
        ({"prompt_ids": [1, 1, 2]}, "other token ids"),
        ({"prompt_ids": None}, "other token ids"),
        ({"stopped": 8}, "ends 8 of 10"),
        ({"stop_ids": [5]}, "does not stop at the tokens 2"),
    ],
)
def test_each_promise_is_judged(change, word):
    assert judge(MEASURED, MEASURED, BASE, 0.01, 0.1, 10) == ()
    assert word in " ".join(judge(MEASURED | change, MEASURED, BASE, 0.01, 0.1, 10))


def test_nearer_to_the_base_is_lost_even_under_the_bound():
    assert "tuning is lost" in judge(MEASURED | {"kl": 0.21}, MEASURED, BASE, 0.5, 0.5, 10)[0]


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
