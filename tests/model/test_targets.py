"""Each name that the adapter is to go to is there, or one line says which is not and what comes near."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_trainer.__main__ import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.load import BaseOptions
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.model.outline import outline_adapted
from tests import families, tiny


def trained(model_type: str = "llama", **lora: object) -> set[str]:
    """Modules that an adapter goes to, as the plan asks, by their last two names."""
    config = families.tiny_config(model_type)
    model = outline_adapted(config, BaseOptions("somewhere"), LoraOptions(r=2, **lora), "cuda")
    return {".".join(name.split(".")[-2:]) for name in model.targeted_module_names}


@pytest.mark.parametrize(
    "wanted", ["q_proj,v_proj", "q_proj, v_proj", ["q_proj", "v_proj"], r"model\.layers\.\d\..*\.[qv]_proj"]
)
def test_names_and_expressions_mean_what_they_mean_to_peft(wanted) -> None:
    assert trained(target_modules=wanted) == {"self_attn.q_proj", "self_attn.v_proj"}


def test_a_bare_name_is_a_name() -> None:
    assert trained(target_modules="down_proj") == {"mlp.down_proj"}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["q_proj", "typo"], r"no module named 'typo'; its linear layers are down_proj, gate_proj.* v_proj$"),
        ("q_porj,v_proj,typo", r"'q_porj' \(near: q_proj, v_proj\), 'typo'"),
        ("query", r"no module named 'query'"),
        (
            r".*layers\.9\..*",
            r"matches no module: .* whole name, such as model\.layers\.0\.self_attn\.q_proj",
        ),
        ("(q_proj", r"'\(q_proj' is no regular expression"),
        (["mlp"], r"model\.layers\.0\.mlp is a LlamaMLP: LoRA adapts"),
        (".*", r"model is a LlamaModel: LoRA adapts"),
    ],
)
def test_what_matches_nothing_or_nothing_of_use_is_refused_by_name(wanted, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules: .*{said}"):
        trained(target_modules=wanted)


def test_the_model_that_is_loaded_is_asked_as_its_outline_is() -> None:
    base = tiny.model("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match="no module named 'typo'"):
        attach(base, LoraOptions(target_modules=["q_proj", "typo"]), seed=0)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["lm_haed"], r"this model has no module named 'lm_haed' \(near: lm_head\)"),
        (["head"], r"this model has no module named 'head' \(near: lm_head\)"),
        (["norm"], r"'norm' would train model\.layers\.0\.input_layernorm too; .* such as model\.norm"),
        (["down_proj"], r"'down_proj' is quantized"),
    ],
)
def test_modules_to_save_are_those_that_are_named(wanted, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lora\.modules_to_save: {said}"):
        trained(target_modules=["q_proj"], modules_to_save=wanted)


def test_names_of_experts_that_became_one_parameter_are_understood_as_peft_does() -> None:
    config = families.tiny_config("mixtral")
    lora = LoraOptions(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    model = outline_adapted(config, BaseOptions("somewhere"), lora, "cuda")
    assert any("experts.gate_up_proj" in name for name in model.base_model.targeted_parameter_names)
    with pytest.raises(ConfigError, match="without also targeting w3"):
        trained("mixtral", target_modules=["w1", "w2"])
    with pytest.raises(ConfigError, match="no module named 'w9'"):
        trained("mixtral", target_modules=["q_proj", "w9"])


def test_all_linear_is_what_a_text_passes_and_an_adapter_can_be_added_to() -> None:
    towers = trained("gemma3")
    assert "self_attn.q_proj" in towers and not any("vision" in name for name in towers)
    assert not any("router" in name for name in trained("llama4_text"))  # it returns a pair
    assert "mamba.out_proj" not in trained("falcon_h1")  # read past its forward by the scan's kernel
    assert "mixer.dt_proj" not in trained("mamba") and "mixer.in_proj" in trained("mamba")
    with pytest.raises(ConfigError, match=r"router is a Llama4Router, which does more than multiply"):
        trained("llama4_text", target_modules=["router"])
    with pytest.raises(ConfigError, match=r"dt_proj: its owner's code in transformers reads the weight"):
        trained("mamba", target_modules=["dt_proj"])


def test_an_adapter_that_peft_would_not_read_again_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"PEFT would not find model\.layers\.\*\.mlp\.shared_experts"):
        trained("laguna")
    assert trained("laguna", target_modules=["q_proj"]) == {"self_attn.q_proj"}


def test_a_missing_target_is_said_before_rows_are_read_and_weights_loaded(tmp_path, capsys) -> None:
    tiny.save(tmp_path / "model")
    row = json.dumps({"instruction": "say", "output": "it"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 9)
    line = ["recipe=tiny", f"model.model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}"]
    line += [f"data.path={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}"]
    for command in ([], ["plan"]):
        assert main([*command, *line, "lora.target_modules=[q_proj,typo]"]) == 2
        said = capsys.readouterr()
        assert "no module named 'typo'" in said.err and "documents" not in said.err + said.out
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["scans"]  # of the rows' form, no tokens


def test_what_is_attached_is_drawn_from_the_seed_alone() -> None:
    """The outline that was asked before leaves the random numbers of the process as they were."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trained()
    assert torch.equal(torch.get_rng_state(), state)
