"""GPTQ, AWQ and RTN end to end; needs the extra `quantize`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import CheckpointError
from qlora_trainer.export.formats import Exporter
from qlora_trainer.export.probe import kernel
from qlora_trainer.export.quantize import QuantizeOptions, quantize
from qlora_trainer.export.source import ExportOptions
from tests.export import runs
from tests.export.test_formats import kl
from tests.export.test_verify import source

pytest.importorskip("gptqmodel")


def calibration():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, 250, (64,), generator=generator).tolist() for _ in range(8)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gptq", {"desc_act": True}),
        ("gptq", {"bits": 3, "sym": False}),
        ("rtn", {"bits": 8}),
        ("awq", {"sym": False}),
    ],
)
def test_quantized_exports_load_with_transformers_and_stay_near(tmp_path, kind, options):
    run = runs.make(tmp_path, num_key_value_heads=4)
    layers: list[tuple[int, int]] = []
    exports = Exporter(
        source(run),
        ExportOptions(group_size=32, dtype=torch.bfloat16, **options),
        run.adapter.parent / "exports",
        runs.CPU,
        calibration,
        lambda kind: lambda done, total: layers.append((done, total)),
    )
    exports.check([kind])
    folder = exports.export(kind)
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    for path in folder.glob("*.json"):  # the library notes down where it worked
        assert "/tmp" not in path.read_text() and str(tmp_path) not in path.read_text(), path.name
    kept = load_file(folder / "model.safetensors")
    assert kept["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.float32 not in {tensor.dtype for tensor in kept.values()}
    assert stored["quant_method"] == {"awq": "awq"}.get(kind, "gptq")
    assert stored["bits"] == options.get("bits", 4) and stored["group_size"] == 32
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [5]
    dtype = torch.bfloat16 if kind == "awq" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"}).eval()
    assert "Linear" in type(model.model.layers[0].mlp.down_proj).__name__
    assert hasattr(model.model.layers[0].mlp.down_proj, "qweight")
    assert kl(run, model) < 0.01
    if kind != "rtn":
        assert layers[-1] == (2, 2)


def test_what_the_library_says_when_it_fails_is_passed_on(tmp_path):
    options = QuantizeOptions("gptq", group_size=32)
    with pytest.raises(CheckpointError, match=r"GPTQModel failed: .*log"):
        quantize(tmp_path / "none", tmp_path / "out", options, [], 2, "cpu", tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("method", "bits", "backend"),
    [
        ("gptq", 4, "gptq_triton"),
        ("gptq", 8, "gptq_triton"),
        ("gptq", 3, "gptq_torch"),
        ("awq", 4, "gemm_triton"),
    ],
)
def test_on_a_gpu_an_export_is_measured_with_a_kernel_that_needs_no_compiler(tmp_path, method, bits, backend):
    stored = {"quantization_config": {"quant_method": method, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert kernel(tmp_path, "cpu") == {}
    assert kernel(tmp_path, "cuda")["quantization_config"].backend == backend
    (tmp_path / "config.json").write_text("{}")
    assert kernel(tmp_path, "cuda") == {}


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "bits"), [("gptq", 4), ("gptq", 8), ("gptq", 3), ("awq", 4)])
def test_a_kernel_on_the_gpu_gives_what_the_cpu_gives(tmp_path, kind, bits):
    run = runs.make(tmp_path, num_key_value_heads=4)
    options = ExportOptions(group_size=32, dtype=torch.bfloat16, bits=bits)
    exports = Exporter(source(run), options, tmp_path / "exports", torch.device("cuda"), calibration)
    folder = exports.export(kind)
    ids = torch.tensor(calibration()[:4])
    logits = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        dtype = torch.bfloat16 if (kind, device) == ("awq", "cpu") else dtype
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **kernel(folder, device)
        )
        assert hasattr(model.model.layers[0].mlp.down_proj, "qweight")
        with torch.inference_mode():
            logits[device] = model.eval()(ids.to(device)).logits.float().cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], atol=0.05, rtol=0.05)
