"""GPUs: which slot gets which, without one; and, where there is one, that it gives what the CPU gives."""

import pytest
import torch

from fedlora.adapter import EVERY_PART
from fedlora.config import ModelConfig, RunnerConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data import tokens
from fedlora.errors import ConfigError
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.run.runfolder import RunFolder
from fedlora.training.client import Turn, train
from fedlora.training.workers import slot_devices


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ({"device": "cuda", "slots": 2}, ["cuda:0", "cuda:1"]),
        ({"device": "cuda:2"}, ["cuda:2"]),
        ({"device": "cpu", "slots": 2}, ["cpu", "cpu"]),
    ],
)
def test_each_slot_owns_a_gpu(four_gpus, settings, expected):
    assert slot_devices(RunnerConfig(**settings)) == expected


def test_more_slots_than_gpus_and_a_gpu_that_is_not_there_are_refused(four_gpus):
    with pytest.raises(ConfigError, match=r"runner.slots=5, but each slot owns a GPU and there are 4"):
        slot_devices(RunnerConfig(slots=5))
    with pytest.raises(ConfigError, match=r"runner.device=cuda:4, but torch sees cuda:0, cuda:1, cuda:2, cuda:3"):
        slot_devices(RunnerConfig(device="cuda:4"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_client_trained_on_a_gpu_is_the_client_trained_on_the_cpu(finished):
    run = RunFolder(finished())
    setup = run.need_json("setup.json")
    data = tokens.open_tokens(run.path / setup["tokens"])
    examples = tokens.examples(data.train, range(32))
    start, results = run.read_state(0).adapter, []
    for device in ("cpu", "cuda:0"):
        model = ResidentModel.build(
            OBJECTIVE, ModelConfig(), LoraConfig(), data.labels, data.pad_token_id, 0, torch.device(device)
        )
        for module in model.peft.modules():  # the devices draw dropout from different streams
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.peft.config.attention_probs_dropout_prob = 0.0
        training = TrainingConfig(local_steps=3, batch_size=8, optimizer="sgd", learning_rate=0.1)
        results.append(train(model, start, examples, training, Turn(0, 1, 0), EVERY_PART, data.padding))
    cpu, gpu = (result.adapter.tensors() for result in results)
    assert all(torch.allclose(cpu[name], gpu[name], atol=1e-4) for name in cpu)
