import peft
import torch

from qlora_trainer.inference.generate import Sampling, generate, pad_left
from tests import tiny

PROMPTS = [[5, 9, 12], [7, 8, 9, 10, 11, 30, 31], [44], [100, 101, 102, 103]]
GREEDY = Sampling(max_new_tokens=12)


def alone(model, prompt, stop):
    """Greedy decoding written out, without padding and without a cache."""
    ids, answer = list(prompt), []
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
        answer.append(token)
    return answer


def test_batched_answers_equal_those_of_each_prompt_alone():
    model = tiny.model().eval()
    free = [alone(model, prompt, ()) for prompt in PROMPTS]
    stop = [free[1][4]]  # a token that does come up, so that stopping is tested too
    expected = [alone(model, prompt, stop) for prompt in PROMPTS]
    assert any(len(answer) < 12 for answer in expected)
    for batch_size in (1, 3, 8):
        found = generate(model, PROMPTS, stop, pad_id=0, sampling=Sampling(12, batch_size=batch_size))
        assert found == expected


def test_pad_may_be_the_stop_token():
    model = tiny.model()
    expected = [alone(model.eval(), prompt, [2]) for prompt in PROMPTS]
    assert generate(model, PROMPTS, [2], pad_id=2, sampling=GREEDY) == expected


def test_sampling_repeats_with_its_seed_and_leaves_training_untouched():
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules="all-linear")).train()
    torch.manual_seed(1)
    before, own = torch.random.get_rng_state(), model.get_base_model().generation_config
    hot = Sampling(max_new_tokens=20, temperature=1.5, seed=3)
    first = generate(model, PROMPTS, [2], 0, hot)
    assert first == generate(model, PROMPTS, [2], 0, hot)
    assert first != generate(model, PROMPTS, [2], 0, Sampling(20, temperature=1.5, seed=4))
    assert model.training and model.get_base_model().generation_config is own
    assert torch.equal(before, torch.random.get_rng_state())


def test_left_padding_masks_what_it_adds():
    ids, mask = pad_left([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
