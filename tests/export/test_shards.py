import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.export.shards import narrow


def test_narrowing_changes_float32_tensors_and_no_others(tmp_path):
    before = {
        "weight": torch.randn(3, 5),
        "scales": torch.randn(4).half(),
        "qweight": torch.arange(6, dtype=torch.int32).view(2, 3),
        "none": torch.empty(0, 4),
    }
    save_file(before, tmp_path / "wide.safetensors")
    narrow(tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors", torch.bfloat16)
    after = load_file(tmp_path / "narrow.safetensors")
    assert after["weight"].dtype == after["none"].dtype == torch.bfloat16
    assert torch.equal(after["weight"], before["weight"].bfloat16())
    assert all(torch.equal(after[name], before[name]) for name in ("scales", "qweight"))
