"""What is called quantized is: subclasses of Linear too, and what is not is counted and named."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

from qlora_trainer.__main__ import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.linears import Share, is_linear, misread, quantized_share
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.outline import outline_base
from qlora_trainer.model.skeleton import read_configuration
from tests import families, tiny

CPU = torch.device("cpu")


def made(model_type: str, folder) -> str:
    families.make_model(model_type, folder)
    return str(folder)


def test_a_subclass_is_a_linear_layer_if_it_computes_one() -> None:
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e-3

    class Named(nn.Linear):
        pass

    assert is_linear(nn.Linear(3, 5)) and is_linear(Named(3, 5)) and is_linear(FalconLinear(3, 5, bias=False))
    assert not is_linear(Shifted(3, 5)) and not is_linear(nn.Embedding(3, 5))
    with torch.device("meta"):
        assert is_linear(FalconLinear(4096, 512)) and not is_linear(Shifted(3, 5))
        assert not is_linear(Llama4Router(families.tiny_config("llama4_text")))


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_falcon_is_quantized(tmp_path, method: str) -> None:
    folder = made("falcon", tmp_path)
    model = load_base(BaseOptions(folder, method=method), CPU)
    kind = Linear4bit if method == "nf4" else Linear8bitLt
    layers = [module for module in model.transformer.h.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 8 and all(isinstance(module, kind) for module in layers)
    assert quantized_share(model).of_body == 1.0
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(plain)
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        off = (model(input_ids=ids).logits - plain(input_ids=ids).logits).norm()
    assert off < 0.2 * plain(input_ids=ids).logits.norm()


def test_a_quantized_falcon_is_kept_and_read_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = BaseOptions(made("falcon", tmp_path / "model"), cache_quantized=True)
    said: list[str] = []
    first, again = (load_base(options, CPU, said.append) for _ in range(2))
    assert any("kept" in line for line in said) and any("read from" in line for line in said)
    ids = torch.arange(6, 20)[None]
    assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)


def test_falcon_without_quantization_is_as_transformers_has_it(tmp_path) -> None:
    model = load_base(BaseOptions(made("falcon", tmp_path), method="none"), CPU)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear


def test_what_is_not_quantized_is_named_and_its_share_is_right(tmp_path) -> None:
    model = load_base(BaseOptions(made("mixtral", tmp_path)), CPU)
    share = quantized_share(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    routers = sum(p.numel() for name, p in model.named_parameters() if "gate.weight" in name)
    attention = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, Linear4bit)
    )
    assert share.quantized == attention and share.body == attention + experts + routers
    names = [name for name, _ in share.left]
    assert names[:2] == ["model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"]
    assert str(share).startswith(
        "11% of the body's weights; not quantized: model.layers.*.mlp.experts.gate_up"
    )


def test_adapters_do_not_change_the_share(tmp_path) -> None:
    model = load_base(BaseOptions(made("granitemoe", tmp_path)), CPU)
    before = quantized_share(model)
    adapted = attach(model, LoraOptions(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), 0)
    assert quantized_share(adapted.get_base_model()) == before


def test_nine_tenths_are_enough_and_less_is_refused_by_name() -> None:
    Share(90, 100, (("experts", 10),)).check("nf4")
    Share(0, 100, (("experts", 100),)).check("none")
    with pytest.raises(
        ConfigError, match=r"nf4 reaches 89% .* experts 11%; quantization\.allow_partial=true"
    ):
        Share(89, 100, (("experts", 11),)).check("nf4")
    assert str(Share(999_999, 1_000_000, (("gate", 1),))).startswith("99% ")  # never 100% of less than all


@pytest.mark.parametrize("model_type", ["mamba", "longcat_flash", "deepseek_v32"])
def test_weights_that_are_read_past_their_forward_are_left_as_they_are(tmp_path, model_type: str) -> None:
    """Bytes of 4-bit codes would be taken for numbers, or for the dtype of activations."""
    options = BaseOptions(made(model_type, tmp_path))
    model = load_base(options, CPU)
    past = misread(model)
    assert past and not any(isinstance(model.get_submodule(name), Linear4bit) for name in past)
    outline = outline_base(read_configuration(options.name_or_path), options, "cpu")
    assert quantized_share(outline) == quantized_share(model)
    assert misread(tiny.model("llama")) == {}


@pytest.fixture
def line(tmp_path) -> list[str]:
    families.make_model("mixtral", tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "rows.jsonl").write_text('{"text": "one, two, three"}\n' * 9)
    assert config["vocab_size"] == families.VOCABULARY
    return [
        "recipe=tiny", f"model.model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}",
        f"data.path={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=2",
    ]  # fmt: skip


def test_a_run_of_a_partly_quantized_base_is_refused_or_says_so_everywhere(line, tmp_path, capsys) -> None:
    assert main(["plan", *line]) == main(line) == 2
    assert capsys.readouterr().err.count("quantization.method=nf4 reaches 11% of the body's weights") == 2
    families.make_model("mixtral", tmp_path / "model", vocab_size=263)
    assert main([*line, "quantization.allow_partial=true"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "quantized nf4, 11% of the body's weights" in said  # the plan
    assert "nf4 + double quantization, 11% of the body's weights; not quantized: model.layers.*" in said
    record = json.loads((tmp_path / "run" / "adapter" / "training.json").read_text())
    assert 0.10 < record["quantized"] < 0.12
    assert next(iter(record["not_quantized"])) == "model.layers.*.mlp.experts.gate_up_proj"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["share"]["quantized"] / plan["share"]["body"] == pytest.approx(record["quantized"])
    assert "not quantized" in (tmp_path / "run" / "adapter" / "README.md").read_text()
