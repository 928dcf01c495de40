"""K-quants: llama.cpp's mix of types, the rounding in its own process, what is said without the library."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from qlora_trainer.errors import CheckpointError, ConfigError
from qlora_trainer.export.kquants import KQuantizer, tensor_type
from tests.export import runs
from tests.export.test_merge import IDS, logits
from tests.export.test_verify import exporter

needs_auto_round = pytest.mark.skipif(
    importlib.util.find_spec("auto_round") is None, reason="needs the extra `kquants`"
)


def test_the_mix_is_llama_cpps():
    down = [tensor_type(f"blk.{i}.ffn_down.weight", 1024, "q4_k_m", 32, False) for i in range(32)]
    assert [i for i, chosen in enumerate(down) if chosen is Q.Q6_K] == [
        *(0, 1, 2, 3), *(6, 9, 12, 15, 18, 21, 24, 27), *(28, 29, 30, 31),
    ]  # fmt: skip
    assert set(down) == {Q.Q4_K, Q.Q6_K}
    assert tensor_type("blk.0.attn_v.weight", 1024, "q5_k_m", 32, False) is Q.Q6_K
    assert tensor_type("blk.0.attn_q.weight", 1024, "q5_k_m", 32, False) is Q.Q5_K
    assert tensor_type("output.weight", 1024, "q4_k_m", 32, False) is Q.Q6_K
    assert tensor_type("token_embd.weight", 1024, "q4_k_m", 32, tied=True) is Q.Q6_K
    assert tensor_type("token_embd.weight", 1024, "q4_k_m", 32, tied=False) is Q.Q4_K


def test_rows_that_superblocks_do_not_fill_fall_back_as_in_llama_cpp():
    assert tensor_type("blk.5.attn_q.weight", 576, "q4_k_m", 32, False) is Q.Q5_0
    assert tensor_type("blk.5.attn_q.weight", 576, "q5_k_m", 32, False) is Q.Q5_1
    assert tensor_type("output.weight", 576, "q4_k_m", 32, False) is Q.Q8_0


@needs_auto_round
def test_a_q4_k_m_file_holds_the_model_that_was_trained(tmp_path):
    run = runs.make(tmp_path, hidden_size=256, intermediate_size=320, tie_word_embeddings=True)
    exports = exporter(run, gguf_type="q4_k_m")
    exports.check(["gguf"])
    folder = exports.export("gguf")
    tensors = {t.name: t.tensor_type for t in gguf.GGUFReader(folder / "model-q4_k_m.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"] == Q.Q4_K and tensors["blk.1.attn_v.weight"] == Q.Q6_K
    assert tensors["blk.0.ffn_down.weight"] == Q.Q5_0 and tensors["token_embd.weight"] == Q.Q6_K
    assert tensors["blk.0.attn_norm.weight"] == Q.F32
    model = runs.load_gguf(folder)
    with torch.no_grad(), run.model.disable_adapter():
        untuned = run.model(IDS).logits
    trained = logits(run.model)
    assert (logits(model) - trained).norm() < 0.5 * (untuned - trained).norm()
    assert not list(folder.parent.glob("*.log"))


@needs_auto_round
@pytest.mark.parametrize(("kind", "error"), [(Q.Q4_K, 0.08), (Q.Q5_K, 0.04), (Q.Q6_K, 0.02)])
def test_rounding_is_as_near_as_its_bits_allow_and_leaves_the_weight_alone(tmp_path, kind, error):
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    before = weight.clone()
    with KQuantizer(tmp_path / "log.txt", "cpu") as kquantizer:
        found = [kquantizer.quantize(part, kind) for part in (weight, weight[:8])]
    back = torch.from_numpy(gguf.quants.dequantize(found[0], kind))
    assert (back - weight).norm() < error * weight.norm() and not back[3].any()
    assert (found[1] == found[0][:8]).all() and torch.equal(weight, before)


def test_without_the_library_one_line_says_what_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = runs.make(tmp_path)
    with pytest.raises(ConfigError, match=r"q4_k_m needs auto-round: pip install .*kquants.* q8_0 q5_1"):
        exporter(run, gguf_type="q4_k_m").check(["gguf"])


def test_what_the_library_says_when_it_fails_is_passed_on_and_kept(tmp_path, monkeypatch):
    broken = tmp_path / "auto_round"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('wrong day')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run = runs.make(tmp_path, hidden_size=256)
    with pytest.raises(
        CheckpointError, match=r"Q\d_K: auto-round failed: RuntimeError: wrong day \(see .*gguf\.log\)"
    ):
        exporter(run, gguf_type="q4_k_m").export("gguf")
    root = run.adapter.parent / "exports"
    assert [path.name for path in root.iterdir()] == ["gguf.log"]


def test_a_worker_dies_with_the_export_that_started_it(tmp_path):
    slow, born = tmp_path / "auto_round", tmp_path / "pid"
    slow.mkdir()
    (slow / "__init__.py").write_text(
        "import os, pathlib, time\n"
        f"path = pathlib.Path({str(born)!r})\n"
        "path.with_suffix('.new').write_text(str(os.getpid()))\n"
        "path.with_suffix('.new').rename(path)\n"
        "time.sleep(600)\n"
    )
    code = (
        "import pathlib, torch, gguf\n"
        "from qlora_trainer.export.kquants import KQuantizer\n"
        f"quantizer = KQuantizer(pathlib.Path({str(tmp_path / 'log')!r}), 'cpu')\n"
        "quantizer.quantize(torch.zeros(2, 256), gguf.GGMLQuantizationType.Q4_K)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    export = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    wait_for(born.exists)
    worker = psutil.Process(int(born.read_text()))
    assert worker.is_running()
    export.kill()
    export.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
