"""`fedlora aggregate`: as a call, and now and then as a command line. One client's folder may have faults."""

import contextlib
import io
import sys
import warnings

import pytest
import torch
from hypothesis import strategies as st

import fedlora
from fedlora.adapter.base_update import BaseUpdate
from fedlora.exchange import result
from fedlora.exchange.peftfolder import open_peft_folder
from fedlora.strategies import registry
from fedlora_cli import app as cli
from tests.fuzz import campaign, folders

pytestmark = pytest.mark.timeout(0)  # its timer is the one that watches a case
SHARE = 0.2

CALLS = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(registry.names()),
        "per_client": st.booleans(),
        "report": st.sampled_from([None, None, None, "report.json", "out/report.json", "out/README.md", "a", "none/x"]),
        "seed": st.sampled_from([0, 0, 1, -1, 2**70]),
    }
)
NUMBERS = st.sampled_from([0, 1, 1, 2, 3, 0.5, -1, 1e-300, 1e308, float("nan"), float("inf"), 1e-45])
RANKS = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 5, -1, 10**12, 2**63])
VALUES = st.sampled_from([0, 1, 2, 0.5, 1e-9, -1, 1e308, float("nan"), True, None, [], "x", "adam", "random", "base"])


@st.composite
def options(draw, strategy):
    """Values of the strategy's own options, good and bad."""
    fields = registry.find(strategy).Options.model_fields
    return draw(st.dictionaries(st.sampled_from([*fields, "x"]), VALUES, max_size=2))


@st.composite
def cases(draw):
    """(clients, choice, rank of the last, faults of all, faults of the first, call): most are nearly valid."""

    def seldom(values, otherwise, of=6):
        return draw(values) if draw(st.integers(1, of)) == of else otherwise

    count, choice = draw(st.integers(1, 4)), draw(folders.choices())
    call = draw(CALLS)
    call["options"] = seldom(options(call["strategy"]), {})
    for name, good, any_number in (("weights", st.integers(1, 5), NUMBERS), ("ranks", st.integers(1, 4), RANKS)):
        given = seldom(st.lists(good, min_size=count, max_size=count), None, 3)
        call[name] = seldom(st.lists(any_number, max_size=count), given, 12)
    call["command"] = draw(st.integers(1, 10)) == 10
    rank = seldom(st.integers(1, 6), None, 3)
    everyones = seldom(st.lists(st.one_of(*folders.TENSOR_FAULTS), min_size=1, max_size=2), [], 4)
    firsts = seldom(st.lists(folders.FAULTS, min_size=1, max_size=2), [], 3)
    return count, choice, rank, everyones, firsts, call


def write(place, case):
    count, choice, rank, everyones, firsts, _ = case
    clients = []
    for index in range(count):
        own = (choice[0], rank, *choice[2:]) if rank and index == count - 1 else choice
        clients.append(place / "abcd"[index])
        folders.made(own, [*everyones, *(firsts if index == 0 else [])]).write(clients[-1])
    return clients


def test_clients_are_combined_or_refused(shard, place):
    def check(case):
        call, out = case[-1], place / "out"
        report = place / call["report"] if call["report"] else None
        try:
            clients = write(place, case)
            before = campaign.tree(place)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = by_command if call["command"] else by_call
                done = run(call, clients, out, report)
            left = set(campaign.tree(place)) - set(before)
            allowed = {"out"} | ({str(report.relative_to(place)), "none"} if report else set())
            strange = [name for name in left if name not in allowed and not name.startswith("out/")]
            assert not strange, f"left behind: {strange}"
            assert done or not left, f"refused, and left behind: {left}"
            if done:
                check_output(out, call)
        finally:
            campaign.empty(place)

    campaign.run(shard, cases(), check)


def by_call(call, clients, out, report):
    def act():
        names = ("strategy", "weights", "ranks", "options", "seed")
        found = fedlora.aggregate(clients, **{name: call[name] for name in names})
        found.save(out, call["per_client"], report)
        for note in found.notes:
            campaign.check_line(note)
        return True

    return campaign.outcome(act)


def by_command(call, clients, out, report):
    words = ["aggregate", f"--strategy={call['strategy']}", f"--out={out}", f"--seed={call['seed']}"]
    words += [f"--{name}={','.join(map(str, call[name]))}" for name in ("weights", "ranks") if call[name] is not None]
    words += [f"--option={key}={value}" for key, value in call["options"].items()]
    words += ["--per-client"] * call["per_client"] + ([f"--report={report}"] if report else [])
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), campaign.watched():
        before, sys.argv = sys.argv, ["fedlora", *words, *map(str, clients)]
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = before
    if code:
        assert code in (1, 2)
        assert errors.getvalue().startswith("error: ")
        assert errors.getvalue().endswith("\n")
        campaign.check_line(errors.getvalue()[:-1])
    return not code


def check_output(out, call):
    """PEFT's folder again, and finite."""
    personal = registry.find(call["strategy"]).traits.personal
    places = ([] if personal else [out]) + (sorted(out.glob("client-*")) if call["per_client"] else [])
    assert places
    for folder in places:
        opened = open_peft_folder(folder)
        opened.peft_content()
        assert result._described(opened) == "" or (folder / "fedlora.json").exists()
        for name, tensor in (dict(opened.stored.items()) | BaseUpdate.read(folder).tensors()).items():
            assert torch.isfinite(tensor).all(), name
