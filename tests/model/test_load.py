"""The base as loaded: quantized where it should be, NF4 as published, nothing trainable."""

from statistics import NormalDist

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.errors import ConfigError, MissingInputError
from qlora_trainer.model.load import BaseOptions, keep_unpacked, load_base, load_tokenizer, pick_device
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.synthetic import random_base
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        ("nf4", bnb.nn.Linear4bit),
        ("fp4", bnb.nn.Linear4bit),
        ("int8", bnb.nn.Linear8bitLt),
        ("none", torch.nn.Linear),
    ],
)
def test_linear_layers_are_quantized_and_head_and_embeddings_are_not(folder, method, layer):
    model = load_base(BaseOptions(folder, method=method), CPU)
    assert type(model.model.layers[0].mlp.down_proj) is layer
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_evaluating_leaves_the_quantized_base_bit_unchanged(folder):
    model = load_base(BaseOptions(folder), CPU)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))
    assert torch.equal(layer.weight.data, before[0])
    assert torch.equal(layer.weight.quant_state.absmax, before[1])


class Repacked(Exception):
    """What the simulated CPU does instead of repacking a weight for its bfloat16 kernel."""


@pytest.fixture
def avx512_bf16(monkeypatch):
    def repack(weight, state, *more):
        raise Repacked

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)


def test_evaluation_multiplies_with_the_weights_of_training_on_a_cpu_with_avx512_bf16(folder, avx512_bf16):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": CPU}
    )
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        training = model.train()(input_ids=ids).logits
        with pytest.raises(Repacked):  # what plain transformers does on such a CPU
            model.eval()(input_ids=ids)
        keep_unpacked(model)
        assert torch.equal(model.eval()(input_ids=ids).logits, training)
        for ours in (load_base(BaseOptions(folder), CPU), random_base(model.config, CPU)):
            training = ours.train()(input_ids=ids).logits
            assert torch.equal(ours.eval()(input_ids=ids).logits, training)


def test_a_width_that_bitsandbytes_misreads_on_a_cpu_is_refused(tmp_path):
    folder = str(tiny.save(tmp_path, intermediate_size=96))
    with pytest.raises(ConfigError, match=r"down_proj \(96\)"):
        load_base(BaseOptions(folder), CPU)
    load_base(BaseOptions(folder, method="int8"), CPU)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (5, 192), (576, 1536)])
def test_quantization_error_is_that_of_nf4_for_the_widths_we_accept(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    restored = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    assert 0.08 < ((restored - weight).norm() / weight.norm()).item() < 0.1


def published_nf4() -> torch.Tensor:
    """The 16 levels by the paper's construction (QLoRA, appendix E): quantiles of N(0, 1), an exact zero."""
    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    quantile = NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*positive, *negative, 0.0]))
    return (levels / levels.max()).float()


def test_nf4_round_trip_hits_the_published_code_book():
    codes = published_nf4()
    absmax = torch.rand(40) + 0.5
    weight = codes[torch.randint(16, (40, 64))]
    weight[:, 0] = 1.0  # so that a block's absmax is its scale
    weight = (weight * absmax[:, None]).contiguous()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    restored = bnb.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(restored, weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("double_quant", "expected"), [(False, 0.5), (True, 0.127)])
def test_quantization_constants_cost_what_the_paper_says(tmp_path, double_quant, expected):
    folder = str(tiny.save(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=1))
    model = load_base(BaseOptions(folder, double_quant=double_quant), CPU)
    bits = parameters = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            parameters += state.shape.numel()
            assert module.weight.numel() == state.shape.numel() // 2
            bits += 8 * state.absmax.numel() * state.absmax.element_size()
            if state.nested:
                bits += 8 * state.state2.absmax.numel() * state.state2.absmax.element_size()
    assert parameters > 3_000_000
    assert bits / parameters == pytest.approx(expected, abs=0.001)


def one_step(model: torch.nn.Module) -> torch.Tensor:
    """The loss after a step of AdamW from `model`'s."""
    adapted = attach(model, LoraOptions(r=4, dtype=torch.float32), seed=0).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        return adapted(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_a_ready_4_bit_checkpoint_is_not_quantized_again_and_trains_as_its_source(
    folder, tmp_path, monkeypatch, method, double_quant
):
    """Saved by plain transformers and bitsandbytes, as anyone's is."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=double_quant
    )
    AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    ).save_pretrained(tmp_path)
    source = load_base(BaseOptions(folder, method=method, double_quant=double_quant), CPU)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", lambda *_, **__: pytest.fail("quantized again"))
    stored = load_base(BaseOptions(str(tmp_path), method=method), CPU)
    assert type(stored.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    start = stored(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits
    assert torch.equal(start, source(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits)
    loss = one_step(stored)
    assert torch.equal(loss, one_step(source)) and loss.isfinite()


def test_a_stored_checkpoint_refuses_another_method(folder, tmp_path):
    load_base(BaseOptions(folder, method="nf4"), CPU).save_pretrained(tmp_path)
    for method in ("int8", "fp4", "none"):
        with pytest.raises(ConfigError, match="already stored as nf4"):
            load_base(BaseOptions(str(tmp_path), method=method), CPU)


def test_what_is_not_a_model_says_so(tmp_path):
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        load_base(BaseOptions(str(tmp_path)), CPU)
    with pytest.raises(MissingInputError, match="no model folder"):
        load_base(BaseOptions(str(tmp_path / "nowhere")), CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingInputError, match="no model can be read"):
        load_base(BaseOptions(str(tmp_path)), CPU)
    with pytest.raises(MissingInputError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_asked_and_absent():
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        pick_device("cuda")
