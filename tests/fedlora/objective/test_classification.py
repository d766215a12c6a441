"""Scores against scikit-learn and a plain loop over single, unpadded examples."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from fedlora import metrics
from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Examples, Padding
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import ACCURACY, OBJECTIVE, Confusion

LABELS = 4


def made(count: int, seed: int = 0) -> Examples:
    """Labels 0 to 2 only: label 3 never occurs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    ids = [rng.integers(5, 99, length).astype(np.int32) for length in lengths]
    return Examples(ids, None, rng.integers(0, 3, count), lengths.astype(np.int64))


def nothing() -> Examples:
    return Examples([], None, np.zeros(0, np.int64), np.zeros(0, np.int64))


def part(examples: Examples, rows: slice) -> Examples:
    return Examples(examples.input_ids[rows], None, examples.labels[rows], examples.lengths[rows])


@pytest.fixture(scope="module")
def model(small_bert) -> ResidentModel:
    config, lora = ModelConfig(name=str(small_bert()), pooling="mean"), LoraConfig(rank=2)
    resident = ResidentModel.build(OBJECTIVE, config, lora, ["a", "b", "c", "d"], 0, 0, torch.device("cpu"))
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in resident._handles.values():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        ids = torch.randint(5, 99, (64, 12), generator=g)
        logits = resident.peft.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        bias = resident._handles["base_model.model.classifier.bias"]
        bias -= logits.mean(0)  # so that every class is predicted
    return resident


@pytest.fixture(scope="module")
def plain(model):
    """Probabilities of 53 examples, one at a time."""
    examples, rows = made(53), []
    model.peft.eval()
    for ids in examples.input_ids:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            rows.append(model.peft(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].double().softmax(-1))
    return torch.stack(rows).numpy()


def test_scores_are_those_of_scikit_learn_on_a_plain_loop(model, plain):
    model.peft.train()  # dropout must be off all the same
    examples = made(53)
    scores = OBJECTIVE.evaluate(model, examples, 8, Padding(0))
    truth, predicted = examples.labels, plain.argmax(1)
    assert len(set(predicted)) > 2
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(truth, predicted, labels=range(LABELS)))
    assert scores.examples == 53
    assert scores.accuracy == pytest.approx(accuracy_score(truth, predicted))
    assert scores.macro_f1 == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores.loss == pytest.approx(log_loss(truth, plain, labels=range(LABELS)), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batching_changes_no_prediction(model, plain, batch_size, side):
    """BERT counts positions from the left, so left padding moves them: only the counts of examples hold there."""
    scores = OBJECTIVE.evaluate(model, made(53), batch_size, Padding(0, side))
    assert scores.examples == 53
    if side == "right" or batch_size == 1:
        assert scores.accuracy == pytest.approx(accuracy_score(made(53).labels, plain.argmax(1)))


def test_parts_add_up(model):
    examples = made(53)
    whole = OBJECTIVE.evaluate(model, examples, 16, Padding(0))
    parts = [OBJECTIVE.evaluate(model, part(examples, slice(i, None, 3)), 16, Padding(0)) for i in range(3)]
    total = parts[0] + parts[1] + parts[2]
    np.testing.assert_array_equal(total.confusion, whole.confusion)
    assert total.loss == pytest.approx(whole.loss)
    assert total.macro_f1 == pytest.approx(whole.macro_f1)


def test_scores_survive_json(model):
    import json

    scores = OBJECTIVE.evaluate(model, made(20), 16, Padding(0))
    again = Confusion.from_json(json.loads(json.dumps(scores.to_json())))
    np.testing.assert_array_equal(again.confusion, scores.confusion)
    assert again.confusion.dtype == np.int64
    assert again.loss_sum == scores.loss_sum


def test_macro_f1_of_absent_classes_by_hand():
    """Truth 0,0,1; predicted 0,2,2: F1 is 2/3 for 0, 0 for 1, 0 for 2, and 3 is left out as it occurs nowhere."""
    confusion = np.zeros((4, 4), np.int64)
    for truth, predicted in ((0, 0), (0, 2), (1, 2)):
        confusion[truth, predicted] += 1
    scores = Confusion(confusion, 3.0)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert scores.macro_f1 == pytest.approx(f1_score([0, 0, 1], [0, 2, 2], average="macro"))
    assert (scores.accuracy, scores.loss) == (pytest.approx(1 / 3), 1.0)


def test_a_client_without_test_examples_is_left_out_of_the_means(model):
    empty, one = OBJECTIVE.evaluate(model, nothing(), 8, Padding(0)), OBJECTIVE.evaluate(model, made(9), 8, Padding(0))
    assert empty.examples == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.of_local([empty, one, empty], ACCURACY) == metrics.of_local([one], ACCURACY)
        assert metrics.of_local([empty], ACCURACY) == metrics.of_local([], ACCURACY) == {}
    assert (empty + one).accuracy == one.accuracy


def test_local_metrics_are_mean_tenth_percentile_and_worst():
    clients = [Confusion(np.array([[hits, 10 - hits], [0, 0]]), 0.0) for hits in (9, 2, 5, 8)]
    found = metrics.of_local(clients, ACCURACY)
    assert found["local/accuracy"] == pytest.approx(0.6)
    assert found["local/accuracy_worst"] == pytest.approx(0.2)
    assert found["local/accuracy_p10"] == pytest.approx(np.percentile([0.9, 0.2, 0.5, 0.8], 10))
    assert metrics.gap({**found, "global/accuracy": 0.45}, ACCURACY)["gap/accuracy"] == pytest.approx(0.15)
    assert metrics.gap(found, ACCURACY) == {}
