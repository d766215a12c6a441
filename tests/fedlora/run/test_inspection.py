"""Every broken update is refused in one line that says what is wrong with it, whatever else is right."""

import re

import pytest
import torch

from fedlora.adapter import Adapter, Factors, weights
from fedlora.channel import faults as channel
from fedlora.errors import UpdateRejected
from fedlora.run import inspection
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn

TURN = Turn(0, 2, 1)


@pytest.fixture
def start(uploads):
    return uploads.adapter(1)


@pytest.fixture
def upload(start):
    moved = {name: tensor + 0.01 for name, tensor in start.tensors().items()}
    return Adapter.from_tensors(moved)


@pytest.fixture
def run(configure, tmp_path):
    return RunFolder.create(tmp_path / "run", configure({"channel.max_norm": 10}))


SAID = {"rank": 3, "losses": [0.5], "seconds": 1.0, "bytes": {}, "validation": None, "local": None}
"""What else a client says of its training."""


@pytest.fixture
def send(run, upload):
    """`send(round=1)`: the update written as client 1 would in round 2, with changes to what it says of itself."""

    def write(adapter=upload, **changes):
        record = {"round": 2, "client": 1, "ticket": channel.ticket(TURN), "examples": 50, **SAID, **changes}
        run.write_tensors(
            run.client_stem(2, 1), adapter.tensors(), {k: v for k, v in record.items() if v != "left out"}
        )

    return write


@pytest.fixture
def refusal(run, start):
    def message() -> str:
        with pytest.raises(UpdateRejected) as error:
            inspection.inspect(run, TURN, start, 60)
        text = str(error.value)
        assert "\n" not in text
        assert "client 1, round 2" in text
        return text

    return message


def test_what_was_asked_for_is_accepted_as_it_was_sent(send, run, start, upload):
    send()
    found = inspection.inspect(run, TURN, start, 60).adapter.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in upload.tensors().items())


def test_an_update_that_lives_in_its_file_is_the_same(send, run, start, upload):
    send()
    found = inspection.inspect(run, TURN, start, 60, in_memory=False).adapter
    assert isinstance(found.factors, weights._StoredFactors)
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in upload.tensors().items())


@pytest.mark.parametrize("missing", SAID)
def test_a_record_that_does_not_say_what_it_should(send, refusal, missing):
    send(**{missing: "left out"})
    assert f"the update does not say what it should (KeyError('{missing}'))" in refusal()


SCORES = {"confusion": [[2, 1], [0, 3]], "loss_sum": 1.5}
MALFORMED = {
    "bytes that are text": {"bytes": {"up_head": "9"}},
    "bytes that are a truth value": {"bytes": {"up_head": True}},
    "bytes below none": {"bytes": {"up_head": -1}},
    "bytes of another kind": {"bytes": {"sideways": 1}},
    "bytes in a list": {"bytes": [1, 2]},
    "no bytes": {"bytes": None},
    "seconds that are text": {"seconds": "1.0"},
    "seconds without end": {"seconds": float("inf")},
    "seconds beyond every float": {"seconds": 10**400},
    "a loss that is text": {"losses": [0.5, "0.4"]},
    "a loss that is no number": {"losses": [float("nan")]},
    "losses that are a number": {"losses": 0.5},
    "a client that is nearly the right one": {"client": True},
    "a round that is nearly the right one": {"round": 2.0},
    "a rank that is text": {"rank": "3"},
    "scores that are a number": {"local": 0},
    "scores that are not square": {"local": {**SCORES, "confusion": [[1, 2]]}},
    "scores in a row": {"local": {**SCORES, "confusion": [1, 2]}},
    "ragged scores": {"local": {**SCORES, "confusion": [[1, 2], [3]]}},
    "scores of half an example": {"local": {**SCORES, "confusion": [[0.5]]}},
    "scores of fewer than none": {"local": {**SCORES, "confusion": [[-1]]}},
    "scores that are text": {"local": {**SCORES, "confusion": [["1"]]}},
    "scores beyond every integer": {"local": {**SCORES, "confusion": [[10**400]]}},
    "a loss of scores that is text": {"validation": {**SCORES, "loss_sum": "1.5"}},
    "a validation on nothing": {"validation": {**SCORES, "confusion": [[0]]}},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_record_of_other_types(send, refusal, what):
    send(**MALFORMED[what])
    assert "the update does not say what it should" in refusal()


def test_scores_are_taken_as_they_are_said(send, run, start):
    send(local=SCORES, validation=SCORES)
    record = inspection.inspect(run, TURN, start, 60).record
    assert record.local.to_json() == record.validation.to_json() == SCORES


def test_another_rank_than_it_has(send, refusal):
    send(rank=4)
    assert "says it has rank 4, and has 3" in refusal()


def test_a_lower_rank_is_accepted(send, run, start, upload):
    send(upload.cut(2), rank=2)
    assert inspection.inspect(run, TURN, start, 60).adapter.rank == 2


SAYINGS = {
    "a stale round": ({"round": 1}, r"the update is of round 1"),
    "no round": ({"round": "left out"}, r"the update is of round None"),
    "another client": ({"client": 2}, r"says it is of client 2"),
    "a replayed ticket": ({"ticket": channel.ticket(Turn(0, 1, 1))}, r"ticket '\w{16}' is not the one of this round"),
    "another client's ticket": ({"ticket": channel.ticket(Turn(0, 2, 0))}, r"is not the one of this round"),
    "an earlier attempt's ticket": ({"ticket": channel.ticket(Turn(0, 2, 1, 1))}, r"is not the one of this round"),
    "a ticket that is no text": ({"ticket": {"a": 1}}, r"is not the one of this round"),
    "more examples than it has": ({"examples": 61}, r"trained on 61 examples; expected a number from 1 to 60"),
    "no examples": ({"examples": 0}, r"trained on 0 examples"),
    "negative examples": ({"examples": -5}, r"trained on -5 examples"),
    "examples that are no number": ({"examples": "50"}, r"trained on '50' examples"),
    "a truth value": ({"examples": True}, r"trained on True examples"),
    "a fraction": ({"examples": 1e300}, r"trained on 1e\+300 examples"),
    "a very long word": ({"round": "9" * 5000}, r"of round '9{39}"),
}


@pytest.mark.parametrize("tokens", [0, -1, 50 * 16 + 1, "9", True, None])
def test_tokens_that_it_cannot_have_trained_are_refused_as_weights(configure, tmp_path, start, upload, tokens):
    config = configure({"data.max_length": 16, "weighting": "tokens"})
    run = RunFolder.create(tmp_path / "by-tokens", config)
    record = {"round": 2, "client": 1, "ticket": channel.ticket(TURN), "examples": 50, **SAID, "tokens": tokens}
    run.write_tensors(run.client_stem(2, 1), upload.tensors(), record)
    with pytest.raises(UpdateRejected, match=r"says it trained on .* tokens; expected a number from 1 to 800"):
        inspection.inspect(run, TURN, start, 60)


@pytest.mark.parametrize("saying", SAYINGS)
def test_what_it_says_of_itself(send, refusal, saying):
    changes, message = SAYINGS[saying]
    send(**changes)
    assert re.search(message, refusal())


KINDS = {
    "nan": r"values that are not finite",
    "shape": r"has shape \(3, \d+\), expected \(3, \d+\)",
    "rank": r"has shape .*expected",
    "missing-module": r"is missing",
    "extra-module": r"module_of_nobody.*is not expected",
    "norm": r"the change has norm \S+, above channel.max_norm=10",
    "stale-round": r"is of round 1",
    "replay": r"is not the one of this round",
    "truncated": r"does not have the digest it was sent with",
    "bit-flip": r"does not have the digest it was sent with",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage(run, start, upload, refusal, kind):
    record = {"round": 2, "client": 1, "ticket": channel.ticket(TURN), "examples": 50}
    spoilt = channel.damaged(channel.Message(upload.tensors(), record), kind, start, TURN)
    run.write_tensors(run.client_stem(2, 1), spoilt.tensors, spoilt.record, spoilt.on_the_way)
    assert re.search(KINDS[kind], refusal())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["A", "B", "head"])
def test_values_that_are_not_finite_anywhere(send, refusal, upload, part, value):
    tensors = {name: tensor.clone() for name, tensor in upload.tensors().items()}
    name = next(n for n in tensors if (f"lora_{part}" in n) or (part == "head" and "lora" not in n))
    tensors[name].view(-1)[-1] = value
    send(Adapter.from_tensors(tensors))
    assert f"'{name}' has values that are not finite" in refusal()


def test_another_type(send, refusal, upload):
    module = upload.modules[0]
    send(upload.with_factors({**upload.factors, module: upload.factors[module].to(torch.float64)}))
    assert "F64" in refusal()


def test_a_transposed_factor(send, refusal, upload):
    module = upload.modules[0]
    pair = upload.factors[module]
    send(upload.with_factors({**upload.factors, module: Factors(pair.A.T, pair.B.T)}))
    assert "has shape" in refusal()


def test_no_update_and_half_an_update(send, refusal, run):
    assert "no update arrived" in refusal()
    send()
    (run.path / "rounds/002/client-001.safetensors").unlink()
    assert "does not have the digest" in refusal()


def test_a_description_that_was_tampered_with(send, refusal, run):
    send()
    path = run.path / "rounds/002/client-001.json"
    path.write_text(path.read_text().replace('"examples": 50', '"examples": 60'))
    assert "no update arrived" in refusal()


class TestNorm:
    def test_is_of_everything_that_changed(self, start, upload):
        count = sum(tensor.numel() for tensor in start.tensors().values())
        assert inspection.change_norm(upload, start) == pytest.approx(0.01 * count**0.5, rel=1e-4)
        assert inspection.change_norm(start, start) == 0

    def test_at_a_lower_rank_is_against_what_was_sent_of_it(self, start, upload):
        cut = upload.cut(2)
        count = sum(tensor.numel() for tensor in cut.tensors().values())
        assert inspection.change_norm(cut, start) == pytest.approx(0.01 * count**0.5, rel=1e-4)

    def test_the_bound_itself_is_allowed(self, configure, send, start, upload, tmp_path):
        norm = inspection.change_norm(upload, start)
        for bound, fits in ((norm, True), (norm * 0.999, False)):
            run = RunFolder.create(tmp_path / str(bound), configure({"channel.max_norm": bound}))
            record = {"round": 2, "client": 1, "ticket": channel.ticket(TURN), "examples": 50, **SAID}
            run.write_tensors(run.client_stem(2, 1), upload.tensors(), record)
            if fits:
                inspection.inspect(run, TURN, start, 60)
            else:
                with pytest.raises(UpdateRejected, match=r"above channel\.max_norm"):
                    inspection.inspect(run, TURN, start, 60)
