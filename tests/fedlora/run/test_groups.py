"""Groups of clients: cut by what clients take, with each piece's result, failure and end its own."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ClientFailed, WorkerError
from fedlora.run import groups, jobs
from fedlora.run.groups import Dealer, Worked
from fedlora.run.participation import Ask
from fedlora.run.runfolder import RunFolder


def dealt(pieces, each_s, seconds=2.0, slots=2, kind=lambda piece: "", known=None, least=1):
    """The groups that pieces travel in, in order, when each takes as many seconds."""
    cut, dealer = [], Dealer(seconds, slots)
    if known is not None:
        dealer._each[""] = known
    with ThreadPoolExecutor(1) as threads:

        def submit(group, ended):
            cut.append(list(group))
            return threads.submit(lambda: Worked([piece * 10 for piece in group], each_s))

        found = dealer.deal(pieces, kind, submit, least=least)
    assert found == [piece * 10 for piece in pieces]
    return cut


@given(st.integers(1, 300), st.floats(1e-7, 100), st.floats(0, 10), st.integers(1, 8))
def test_every_piece_is_in_one_group_in_order(count, each_s, seconds, slots):
    cut = dealt(list(range(count)), each_s, seconds, slots)
    assert [piece for group in cut for piece in group] == list(range(count))


@given(st.integers(1, 300), st.floats(1e-7, 100), st.floats(0, 10), st.integers(1, 8), st.integers(1, 9))
def test_those_who_are_trained_together_stay_together(count, each_s, seconds, slots, least):
    cut = dealt(list(range(count)), each_s, seconds, slots, least=least)
    assert [piece for group in cut for piece in group] == list(range(count))
    assert all(len(group) % least == 0 for group in cut[:-1])


def test_short_clients_travel_together_and_long_ones_alone():
    assert len(dealt(list(range(100)), 0.01, known=0.01)) <= 12
    assert all(len(group) == 1 for group in dealt(list(range(20)), 3.0, known=3.0))
    assert all(len(group) == 1 for group in dealt(list(range(20)), 0.001, seconds=0, known=0.001))


def test_no_group_is_longer_than_asked_for_once_it_is_known_how_long_they_take():
    assert max(map(len, dealt(list(range(1000)), 0.1, known=0.1))) == 20


def test_the_last_groups_are_small_so_that_slots_end_together():
    sizes = [len(group) for group in dealt(list(range(1000)), 0.002, known=0.002)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 250
    assert max(sizes[-2:]) <= 100


def test_a_group_has_one_kind():
    kinds = "aaabbbbbaa"
    cut = dealt(list(range(10)), 1e-4, kind=lambda piece: kinds[piece])
    assert all(len({kinds[piece] for piece in group}) == 1 for group in cut)


def test_the_end_of_each_piece_is_told_and_none_more_than_once():
    told = []
    with ThreadPoolExecutor(2) as threads:

        def submit(group, ended):
            def work():
                for _ in group:
                    ended()
                ended()  # a step that was tried again
                return Worked(list(group), 0.1)

            return threads.submit(work)

        Dealer(2.0, 2).deal(range(5), lambda piece: "", submit, told.append)
    assert told[0] == 0
    assert told == sorted(told)
    assert max(told) == 5


def test_all_slots_are_at_work_before_anything_else_is_done():
    """What is done once clients are at work (deliveries, pictures) may take its time."""
    cut, told = [], []
    with ThreadPoolExecutor(1) as threads:

        def submit(group, ended):
            cut.append(group)
            return threads.submit(lambda: Worked(list(group), 1.0))

        Dealer(2.0, 3).deal(range(20), lambda piece: "", submit, lambda done: told.append((done, len(cut))))
    assert told[0] == (0, 6)


def test_what_goes_wrong_in_a_group_is_raised():
    def submit(group, ended):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        Dealer(2.0, 1).deal([1, 2], lambda piece: "", submit)
    with ThreadPoolExecutor(1) as threads, pytest.raises(ZeroDivisionError):
        Dealer(2.0, 1).deal([1, 2], lambda piece: "", lambda group, ended: threads.submit(lambda: 1 // 0))


# -- clients in a slot


class Slot:
    """Counts who is trained; some end their worker that often before they are."""

    def __init__(self, deaths, found=()):
        self.deaths, self.found, self.asked = dict(deaths), found, []

    def run_within(self, seconds, job, path, number, client, attempt, needed):
        self.asked.append(client)
        if self.deaths.get(client, 0):
            self.deaths[client] -= 1
            raise WorkerError(f"died with {client}")
        if client == 9:
            raise ClientFailed("diverged")
        return client not in self.found


@pytest.fixture
def run(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(groups.time, "sleep", lambda seconds: None)
    return RunFolder.create(tmp_path / "run", configure({"runner.retries": 2}))


def test_each_client_of_a_group_is_tried_again_and_fails_by_itself(run):
    slot, ended, said = Slot({1: 2, 2: 3}), [], []
    ask = Ask(1, 0, (0, 1, 2, 9, 3))
    worked = groups.train(slot, run, ask, lambda: ended.append(1), said.append)
    assert worked.results == [None, None, "died with 2", "diverged", None]
    assert slot.asked == [0, 1, 1, 1, 2, 2, 2, 9, 3]
    assert len(ended) == 5
    tried = [f"died with {client}; trying again ({attempt} of 2)" for client in (1, 2) for attempt in (1, 2)]
    assert said == tried


def test_clients_that_are_done_already_say_nothing_of_how_long_one_takes(run):
    ask = Ask(1, 0, (0, 1))
    assert groups.train(Slot({}, found=(0, 1)), run, ask, lambda: None).each_s is None
    assert groups.train(Slot({}, found=(0,)), run, ask, lambda: None).each_s > 0


def test_a_round_that_is_gone_on_with_hands_over_those_who_had_sent_together(run):
    """A thousand uploads are there and a hundred clients are left: not a thousand task runs to find that out."""
    for client in range(1000):
        file = run.path / f"{run.client_stem(1, client)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    cut = []

    def submit(some, ended):
        future = Future()
        cut.append(some.clients)
        future.set_result(Worked([None] * len(some.clients), None if some.clients[0] < 1000 else 0.5))
        return future

    Dealer(2.0, 2).train(run, Ask(1, 0, tuple(range(1100))), submit, lambda done: None)
    assert [client for clients in cut for client in clients] == list(range(1100))
    there = [clients for clients in cut if clients[0] < 1000]
    assert len(there) < 15
    assert all(clients[-1] < 1000 for clients in there)
    assert len(cut[len(there)]) == 1
    assert max(map(len, cut[len(there) :])) <= 4


# -- clients together in a slot


class Cohorts(Slot):
    """Trains clients together; some end their worker that often before they are."""

    def run_within(self, seconds, job, path, number, clients, attempt, needed):
        if job is jobs.fine_tune:
            return super().run_within(seconds, job, path, number, clients, attempt, needed)
        self.asked.append((clients, seconds))
        for client in clients:
            if self.deaths.get(client, 0):
                self.deaths[client] -= 1
                raise WorkerError(f"died with {client}")
        found = [client for client in clients if client in self.found]
        return jobs.Together(len(clients) - len(found), {9: "diverged"} if 9 in clients else {}, ("of note",))


@pytest.fixture
def four(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(groups.time, "sleep", lambda seconds: None)
    changes = {"runner.retries": 1, "training.cohort": 4, "runner.kind": "processes", "runner.timeout_s": 10}
    run = RunFolder.create(tmp_path / "run", configure(changes))
    run.write_json("cohort.json", {"size": 4, "said": ""})
    return run


def test_a_cohort_is_tried_again_and_then_one_by_one(four):
    slot, ended, said = Cohorts({1: 1, 6: 5}), [], []
    worked = groups.train(slot, four, Ask(1, 0, (0, 1, 2, 3, 4, 9, 6, 7, 8)), lambda: ended.append(1), said.append)
    assert worked.results == [None, None, None, None, None, "diverged", "died with 6", None, None]
    first, second, last = (0, 1, 2, 3), (4, 9, 6, 7), (8,)
    assert slot.asked == [(first, 40), (first, 40), (second, 40), (second, 40), 4, 9, 6, 6, 7, (last, 10)]
    assert len(ended) == 9
    assert said == [
        "died with 1; trying again (1 of 1)",
        "of note",
        "died with 6; trying again (1 of 1)",
        "died with 6; one by one",
        "died with 6; trying again (1 of 1)",
        "of note",
    ]


def test_of_a_round_that_is_gone_on_with_whole_cohorts_are_left(four):
    for client in (0, 1, 2, 3, 5, 8):
        file = four.path / f"{four.client_stem(1, client)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    cut = []

    def submit(some, ended):
        future = Future()
        cut.append(some.clients)
        future.set_result(Worked([None] * len(some.clients), 100.0))
        return future

    Dealer(2.0, 2).train(four, Ask(1, 0, tuple(range(10))), submit, lambda done: None)
    assert cut == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
