"""What is written and chosen, against Transformers' own `generate` and a plain sum of log-probabilities."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedlora.config import ModelConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.lora import LoraConfig
from fedlora.model import writing
from fedlora.model.resident import ResidentModel
from fedlora.model.writing import Marks
from fedlora.objective.generation import OBJECTIVE

TEXTS = ["a large animal", "one", "the act of moving quickly over the ground with great effort and speed", "of a plant"]


@pytest.fixture(scope="module")
def tokenizer(small_llama):
    return AutoTokenizer.from_pretrained(small_llama())


@pytest.fixture(scope="module")
def network(small_llama):
    """One whose next token depends on those before it: an untrained one repeats itself."""
    found = AutoModelForCausalLM.from_pretrained(small_llama())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return found.eval()


@pytest.fixture(scope="module")
def model(small_llama, network):
    resident = ResidentModel.build(
        OBJECTIVE, ModelConfig(name=str(small_llama())), LoraConfig(rank=4), [], 0, 0, torch.device("cpu")
    )
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in resident.peft.get_base_model().named_parameters():
            if (plain := name.replace(".base_layer", "")) in own:
                parameter.copy_(own[plain])
    return resident


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [np.array(ids, dtype=np.int32) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]


def alone(network, prompt, tokens, ends):
    """Greedy decoding of one prompt, a whole forward pass for each token."""
    ids = prompt.tolist()
    for _ in range(tokens):
        with torch.no_grad():
            token = int(network(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_answer_is_greedy_whatever_the_batches(model, network, prompts, batch_size):
    expected = [alone(network, prompt, 9, [2]) for prompt in prompts]
    ends = expected[2][4]  # as if it were an end mark: answers of different lengths
    expected = [alone(network, prompt, 9, [2, ends]) for prompt in prompts]
    assert len({len(each) for each in expected}) > 1
    how = GenerateConfig(max_new_tokens=9, batch_size=batch_size)
    assert writing.write(model, prompts, how, Marks(0, (2, ends))) == expected


def test_a_checkpoints_own_settings_do_not_colour_the_answer(model, network, prompts, monkeypatch):
    chatty = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=2, pad_token_id=0)
    base = model.peft.get_base_model()
    monkeypatch.setattr(base, "generation_config", chatty)
    expected = [alone(network, prompt, 6, [2]) for prompt in prompts]
    assert writing.write(model, prompts, GenerateConfig(max_new_tokens=6), Marks(0, (2,))) == expected


def test_drawn_answers_are_drawn_by_seed(model, prompts):
    how = GenerateConfig(max_new_tokens=8, temperature=1.5)

    def drawn(seed):
        torch.manual_seed(seed)
        return writing.write(model, prompts, how, Marks(0, (2,)))

    assert drawn(1) == drawn(1) != drawn(2)


def test_ends_are_those_of_the_tokenizer_and_of_the_model(network, tokenizer):
    network.generation_config.eos_token_id = [2, 5]
    assert Marks.of(network, tokenizer) == Marks(0, (2, 5))
    network.generation_config.eos_token_id = 2
    assert Marks.of(network, tokenizer) == Marks(0, (2,))


def test_the_likeliest_option_is_that_of_the_summed_log_probabilities(model, network, prompts, tokenizer):
    texts = ["yes", "no", "a kind of animal of great size", "plant"]
    options = [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def log_probability(prompt, option):
        ids = torch.from_numpy(np.concatenate([prompt, option]).astype(np.int64))[None]
        with torch.no_grad():
            logs = network(ids).logits[0].double().log_softmax(-1)
        return sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(option))

    sums = np.array([[log_probability(prompt, option) for option in options] for prompt in prompts])
    ones, lengths = [[1] * 4] * 4, [[len(text) for text in texts]] * 4
    assert writing.likeliest(model, prompts, [options] * 4, ones, 0) == sums.argmax(1).tolist()
    by_length = (sums / np.array(lengths)).argmax(1).tolist()
    assert writing.likeliest(model, prompts, [options] * 4, lengths, 0) == by_length
    assert by_length != sums.argmax(1).tolist()
