"""The reference forward: the loss sum it promises, on every architecture, packed or not."""

import pytest
import torch
import torch.nn.functional as F

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.forward import ReferenceForward, document_mask
from qlora_trainer.model.load import BaseOptions, load_base
from qlora_trainer.model.lora import LoraOptions, attach
from qlora_trainer.objectives.sft import sft
from tests import families, tiny
from tests.batches import collate, documents


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_loss_and_gradient_equal_documents_alone(architecture):
    model = tiny.model(architecture).double()
    forward = ReferenceForward(model)
    docs = documents([5, 7, 3, 9, 1, 2])
    packed = sft(forward(collate([docs[:2], docs[2:]], supervised_from=1)))
    packed.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = sum(sft(forward(collate([[document]]))) for document in docs if len(document) > 1)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    assert together, "no gradient reached the model"
    for name, parameter in model.named_parameters():
        if name in together:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_loss_sum_is_plain_cross_entropy_of_the_labels():
    model = tiny.model()
    batch = collate([[d] for d in documents([6, 9, 4])], supervised_from=3)
    logits = model(input_ids=batch.input_ids).logits[:, :-1].float()
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    assert sft(ReferenceForward(model)(batch)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_loss_weights_scale_their_token_only():
    model = tiny.model()
    batch = collate([documents([8])[0:1]])
    base = sft(ReferenceForward(model)(batch)).item()
    batch.loss_weights[0, 5] = 3.0
    logits = model(input_ids=batch.input_ids).logits[0, 4]
    token_loss = F.cross_entropy(logits[None], batch.labels[0, 5:6]).item()
    assert sft(ReferenceForward(model)(batch)).item() == pytest.approx(base + 2 * token_loss, rel=1e-5)


def test_nothing_supervised_is_zero_and_differentiable():
    loss = sft(ReferenceForward(tiny.model())(collate([documents([4])[0:1]], supervised_from=4)))
    loss.backward()
    assert loss.item() == 0


def test_document_mask_is_causal_and_block_diagonal():
    mask = document_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(mask, expected)


def adapted(model_type: str, folder, **changes):
    families.make_model(model_type, folder, **changes)
    base = load_base(BaseOptions(str(folder), method="none"), torch.device("cpu"))
    return attach(base, LoraOptions(r=2, lora_dropout=0.5), seed=0).train()


def test_the_check_before_the_first_step_leaves_nothing_behind(tmp_path):
    model = adapted("opt", tmp_path)
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert ReferenceForward(model).check() == []
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_sees_the_answer_before_it_is_asked_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"type bert .* sees those after it.*is_decoder=true in its config"):
        ReferenceForward(adapted("bert", tmp_path / "encoder", is_decoder=False)).check()
    assert ReferenceForward(adapted("bert", tmp_path / "decoder")).check() == []
    with pytest.raises(ConfigError, match=r"type xlnet .* known before it is learned$"):
        ReferenceForward(adapted("xlnet", tmp_path / "xlnet")).check()


def test_an_architecture_whose_code_fails_in_training_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^model type reformer cannot be trained here: .*ValueError: [^\n]*$"
    ):
        ReferenceForward(adapted("reformer", tmp_path)).check()


def test_adapters_that_no_token_reaches_are_named(tmp_path):
    names = ReferenceForward(adapted("bart", tmp_path)).check()
    assert len(names) == 16 and all("encoder_attn" in name for name in names)


def test_a_model_without_logits_to_keep_gives_those_that_are_asked_for(tmp_path):
    model = adapted("whisper", tmp_path).eval()
    batch = collate([[d] for d in documents([6, 9, 4], vocab=90)], supervised_from=4)
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    assert sft(ReferenceForward(model)(batch)).item() == pytest.approx(expected.item(), rel=1e-6)
