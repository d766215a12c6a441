"""The heavy work of a run, each piece a function that a worker slot executes.

Arguments are the run folder's path and small numbers; results are small values, tensors stay in the run folder. A piece
that is already done, and whole, is not done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import seeds
from fedlora.adapter import Adapter
from fedlora.channel import faults as channel
from fedlora.data import questions, sources, tokens
from fedlora.data.partition import Partition, Split, partition
from fedlora.errors import ClientFailed, DataError
from fedlora.files import home
from fedlora.files.atomic import stamp
from fedlora.model import arithmetic, outline, peftlibrary, provenance
from fedlora.model.base import check_length, load_tokenizer
from fedlora.model.resident import ResidentModel
from fedlora.objective import Scores
from fedlora.run import ranks, rounds, together, warmstart
from fedlora.run.records import ClientRecord, DataRead, Part, Setup
from fedlora.run.runfolder import RUN, RunFolder
from fedlora.run.traffic import Due, crossing, due
from fedlora.seeds import Turn
from fedlora.strategies.base import ServerState
from fedlora.training import client, cohort, memory
from fedlora.training.client import Trained
from fedlora.training.cohort import Member
from fedlora.training.workers import Workbench

_TRIED, _FEW = 4, 16
"""Clients, and examples of the first of them, by which it is found out whether clients can be trained together."""


def warm_up(bench: Workbench) -> None:
    """Import what the other jobs need, while the server still does something else."""
    import transformers  # noqa: F401

    peftlibrary.load()


def peak_memory(bench: Workbench) -> int:
    """Most bytes that this worker has held since its last client began: of its GPU, or of the process."""
    return memory.peak(bench.device)


def prepare_data(bench: Workbench, folder: Path) -> None:
    """Read, tokenise (once per data set, model and length; shared by runs) and partition.

    Raises:
        DataError: the data cannot be read, or not be partitioned as asked.
        ModelError: the tokenizer cannot be loaded, a text holds a token that the model has no row for,
            `data.max_length` is more than the model reads, or the model is no longer the one that the run began with.
    """
    run = RunFolder(folder)
    config = run.config
    known = Setup.known(run)
    dealt = isinstance(run.read_json("partition.json"), dict) and (run.path / "partition.npz").is_file()
    if dealt and known and _data_is_there(known):
        provenance.check(config.model, known.model)
        return
    check_length(config.model, config.data.max_length)
    text = sources.finish(run.objective.draft(config.data, config.partition.by, config.seed))
    origin = provenance.of_model(config.model)
    base = provenance.pinned(config.model, origin)
    run.objective.check_examples(config, text.tables["test"], text.tables["train"])
    tokenizer = load_tokenizer(base)
    path = run.objective.tokenise(text, tokenizer, config.data, home.cache())
    data = bench.keep("data", path, lambda: tokens.open_tokens(path))
    if made_of := outline.of(base, run.objective):
        made_of.check_vocabulary(config.model.name, tokens.highest(data))
    train, test = (Split(tokens.label_array(split), tokens.client_array(split)) for split in (data.train, data.test))
    parts = partition(config.partition, config.clients, config.seed, train, test, data.labels, data.digest)
    parts.save(run.path / "partition.npz")
    Setup(
        tokens=path,
        labels=tuple(data.labels),
        pad_token_id=data.pad_token_id,
        padding_side=tokenizer.padding_side,
        data=DataRead(data.name, data.origin, data.digest, (*text.notes, *data.notes)),
        examples={"train": len(data.train), "test": len(data.test)},
        model=origin,
        notes=tuple(parts.notes()),
    ).write(run)
    run.write_json("partition.json", parts.summary() | _tokens_of(data.train, parts))


def _tokens_of(train: Any, parts: Partition) -> dict[str, list[int]]:
    """Per client, the tokens that are trained in its rows; nothing of labels."""
    if "targets" not in train.column_names:
        return {}
    counted = (tokens.trained_tokens(tokens.examples(train, rows)) for rows in parts.train)
    return {"tokens": [found or 0 for found in counted]}


def told_of_data(run: RunFolder) -> list[str]:
    """What a person should know of the data once `prepare_data` is done, a line each; nothing of a packaged set."""
    setup = Setup.read(run)
    read = "" if setup.data.origin == "packaged" else "; ".join(setup.data.read)
    return [line for line in (read, *setup.notes) if line]


def _data_is_there(setup: Setup) -> bool:
    try:
        tokens.open_tokens(setup.tokens)
    except DataError:
        return False
    return True


def initialise(bench: Workbench, folder: Path) -> str | None:
    """Attach a fresh adapter to the base model and save it as the state before training; settle how many clients are
    trained together.

    Returns what is to be said of the model, if anything.

    Raises:
        DataError: the data is not the one that the run began with.
        ModelError: the model cannot be loaded, or the adapter does not fit it.
    """
    run = RunFolder(folder)
    note = _begin(bench, run)
    if not together.is_settled(run):
        own = _partition(run, bench).sizes
        some = [_asked(bench, run, Turn(run.config.seed, 1, each)) for each, size in enumerate(own) if size][:_TRIED]
        few = max(_FEW, run.config.training.step_size)
        members = [Member(each.start, each.examples.first(few + place), each.turn) for place, each in enumerate(some)]
        state, padding = _state(run, bench, 0), _data(run, bench).padding
        together.settle(run, _model(run, bench, state, 0), members, padding)
    return note


def _begin(bench: Workbench, run: RunFolder) -> str | None:
    """The state before training, if it is not there; what is to be said of the model."""
    dealt_data = run.need_json("partition.json")["hash"]
    record = run.read_record(run.state_stem(0))
    if record and record["partition"] != dealt_data:
        raise DataError(
            f"the data or its partition is not the one that the run in {run.path} began with (hash {dealt_data[:12]}, "
            f"then {record['partition'][:12]}): restore the data, or choose another --run-dir"
        )
    if record and run.read_json("adapter_config.json"):
        return record.get("head")
    model = bench.renew("model", _model_key(run, bench), lambda: _build(run, bench))
    run.objective.check_model(run.config, model)
    run.write_json("adapter_config.json", model.peft_config())
    adapter = model.read()
    shapes = {
        name: {"d_out": p.B.shape[0], "d_in": p.A.shape[1], "rank": p.rank} for name, p in adapter.factors.items()
    }
    config = run.config
    dealt = ranks.at_start(config.lora, config.clients, config.seed)
    fresh = ServerState(adapter, scaling=config.lora.scaling, seed=config.seed, ranks=dealt)
    if run.strategy.traits.changes_base:
        model.check_untied()
    begun = run.strategy.begin(warmstart.begun(config, fresh, _setup(run, bench).labels), model.base_weight)
    model.load(begun.adapter)  # what does not fit the model is refused now, not when the first client trains
    run.write_state(
        begun,
        {
            "partition": dealt_data,
            "modules": shapes,
            "head": model.note,
            "adapter_parameters": sum(p.A.numel() + p.B.numel() for p in adapter.factors.values()),
            "head_parameters": sum(tensor.numel() for tensor in adapter.head.values()),
            "base_parameters": arithmetic.parameters(model.peft.get_base_model()),
        },
    )
    return model.note


def fine_tune(
    bench: Workbench, folder: Path, number: int, client_id: int, attempt: int = 0, needed: Due | None = None
) -> bool:
    """Train one client in round `number` (from 1) and score its model on its own test examples; where its update would
    not arrive in time (`channel.faults`), there is no use in training it. Whether there was something to do.

    Args:
        bench: where.
        folder: of the run.
        number: of the round.
        client_id: which.
        attempt: of the round to have enough clients.
        needed: what the client must receive; without, the rounds before are looked at.

    Raises:
        ClientFailed: training diverged.
    """
    run = _run(bench, folder)
    if run.read_record(run.client_stem(number, client_id)):
        return False
    turn = Turn(run.config.seed, number, client_id, attempt)
    if not channel.fate(run.config, turn).arrives(run.config.channel.deadline_s):
        return False
    asked = _asked(bench, run, turn)
    with memory.watched(bench.device) as peak:
        [came] = _trained(bench, run, [asked], [])
    if isinstance(came, ClientFailed):
        raise came
    _send(bench, run, asked, came, peak.bytes, needed)
    return True


@dataclass(frozen=True)
class Together:
    """What came of a cohort: how many were trained and have sent, why others have failed, and what is to be said."""

    worked: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def fine_tune_together(
    bench: Workbench,
    folder: Path,
    number: int,
    clients: Sequence[int],
    attempt: int,
    needed: Mapping[int, Due] | None = None,
) -> Together:
    """The same of several clients in one pass of the base. Those who have sent already are trained along where another
    has not, but do not send again: what comes out does not depend on it."""
    run = _run(bench, folder)
    sent = {each for each in clients if run.read_record(run.client_stem(number, each))}
    turns = [Turn(run.config.seed, number, each, attempt) for each in clients]
    arriving = [turn for turn in turns if channel.fate(run.config, turn).arrives(run.config.channel.deadline_s)]
    if all(turn.client in sent for turn in arriving):
        return Together()
    asked = [_asked(bench, run, turn) for turn in arriving]
    said: list[str] = []
    with memory.watched(bench.device) as peak:
        found = _trained(bench, run, asked, said)
    failed = {}
    for each, came in zip(asked, found, strict=True):
        if isinstance(came, ClientFailed):
            failed[each.turn.client] = str(came)
        elif each.turn.client not in sent:
            _send(bench, run, each, came, peak.bytes, (needed or {}).get(each.turn.client))
    return Together(len(asked), failed, tuple(said))


@dataclass(frozen=True)
class _Asked:
    """A client that is asked to train: what it was sent, its rows, and those that it holds out."""

    turn: Turn
    start: Adapter
    own: rounds.Examples
    rows: np.ndarray
    held_out: np.ndarray
    examples: tokens.Examples


def _asked(bench: Workbench, run: RunFolder, turn: Turn) -> _Asked:
    config, strategy = run.config, run.strategy
    own = rounds.examples_of(strategy, _partition(run, bench), turn.client)
    rows, held_out = ranks.hold_out(config.lora, turn.round, own.train, config.seed, turn.client)
    start = strategy.broadcast(_state(run, bench, turn.round - 1), turn.client)
    return _Asked(turn, start, own, rows, held_out, tokens.examples(_data(run, bench).train, rows))


def _trained(bench: Workbench, run: RunFolder, asked: Sequence[_Asked], said: list[str]) -> list[together.Came]:
    """What clients of one round come to, together where there are several; `said` takes what a person should know."""
    config, strategy, number = run.config, run.strategy, asked[0].turn.round
    model = _model(run, bench, _state(run, bench, number - 1), number - 1)
    training = asked[0].own.training(config.training).in_round(number, config.rounds)
    parts, padding = strategy.plan(number).trains, _data(run, bench).padding

    def alone(each: Member) -> Trained:
        return client.train(model, each.start, each.examples, training, each.turn, parts, padding, strategy.penalty)

    def at_once(some: Sequence[Member]) -> list[together.Came]:
        return cohort.train(model, some, training, parts, padding, strategy.penalty)

    members = [Member(each.start, each.examples, each.turn) for each in asked]
    return together.train(bench, run, members, alone, at_once, said.append)


def _send(bench: Workbench, run: RunFolder, asked: _Asked, trained: Trained, peak: int, needed: Due | None) -> None:
    """Score a client's model as the run says, and write its update as it arrives."""
    config, turn, number = run.config, asked.turn, asked.turn.round
    needed = needed or due(run, turn, _state(run, bench, number - 1).base, asked.start)
    data, strategy = _data(run, bench), run.strategy
    _loaded(run, bench).load(trained.adapter)
    upload = strategy.after_training(asked.start, trained.adapter)
    record = ClientRecord(
        round=number,
        client=turn.client,
        ticket=channel.ticket(turn),
        examples=len(asked.rows),
        rank=upload.rank,
        losses=trained.losses,
        seconds=trained.seconds,
        bytes=crossing(run, turn, needed, asked.start, upload),
        validation=_score(bench, run, data.train, asked.held_out) if len(asked.held_out) else None,
        local=_own_score(bench, run, number, asked.own.test) if config.evaluation.local else None,
        memory=peak,
        tokens=tokens.trained_tokens(asked.examples),
    )
    message = channel.Message(upload.tensors(), record.to_json())
    if damage := channel.fate(config, turn).damage:
        message = channel.damaged(message, damage, asked.start, turn)
    stem = run.client_stem(number, turn.client)
    run.write_tensors(stem, message.tensors, message.record, message.on_the_way, durable=False)


def evaluate(bench: Workbench, folder: Path, number: int, part: Part) -> Scores:
    """Score the broadcast after round `number` on one part of the test set (see `rounds.evaluation_parts`)."""
    run = _run(bench, folder)
    test = _data(run, bench).test
    if part.split == "probe":  # before the round's broadcast: on the base that the clients trained on
        state = _state(run, bench, number - 1)
        _model(run, bench, state, number - 1).load(Adapter.from_tensors(run.read_tensors(part.stem)))
    else:
        state = _state(run, bench, number)
        chosen = state.adapter if part.client is None else run.strategy.broadcast(state, part.client)
        _model(run, bench, state, number).load(chosen)
    if part.split == "local":
        assert part.client is not None
        return _own_score(bench, run, number, _partition(run, bench).test[part.client])
    if part.split == "answers":
        drawn = rounds.answered_rows(run)
        show = drawn[: run.config.evaluation.generate.shown].tolist()
        return _answered(bench, run, Turn(run.config.seed, number, part.start), drawn[part.start :: part.step], show)
    scores = _score(bench, run, test, np.arange(len(test), dtype=np.int64)[part.start :: part.step])
    if part.split == "probe" and rounds.answered(run, number):
        scores += _answered(bench, run, Turn(run.config.seed, number, 0), rounds.answered_rows(run))
    return scores


def _own_score(bench: Workbench, run: RunFolder, number: int, rows: np.ndarray) -> Scores:
    """Of a client's model on its own test examples; some of them are answered where that is asked for."""
    scores, some = _score(bench, run, _data(run, bench).test, rows), run.config.evaluation.generate.local_examples
    if some and len(rows) and rounds.answered(run, number):
        scores += _answered(bench, run, Turn(run.config.seed, number, int(rows[0])), rows[:some])
    return scores


def _answered(bench: Workbench, run: RunFolder, turn: Turn, rows: np.ndarray, show: Sequence[int] = ()) -> Scores:
    """What answers of the model as it is loaded come to; drawn, if at all, by that turn."""
    model, asked = _loaded(run, bench), questions.questions(_data(run, bench).test, rows.tolist())
    base = provenance.pinned(run.config.model, _setup(run, bench).model)
    tokenizer = bench.keep("tokenizer", base.model_dump_json(), lambda: load_tokenizer(base))
    seeds.seed_torch(turn.seed, "answers", turn.round, turn.client, model.device)
    return run.objective.answer(model, asked, tokenizer, run.config.evaluation.generate, show)


def _score(bench: Workbench, run: RunFolder, split: Any, rows: np.ndarray) -> Scores:
    """Scores of the model as it is loaded, on some rows of a split."""
    padding, batch_size = _data(run, bench).padding, run.config.evaluation.batch_size
    return run.objective.evaluate(_loaded(run, bench), tokens.examples(split, rows), batch_size, padding)


def _run(bench: Workbench, folder: Path) -> RunFolder:
    """The folder of a run that has begun, with its configuration: read once, and again only where it is another."""
    return bench.keep("run", (folder, stamp(folder / RUN)), lambda: RunFolder(folder))


def _data(run: RunFolder, bench: Workbench) -> tokens.TokenisedData:
    path = _setup(run, bench).tokens
    return bench.keep("data", path, lambda: tokens.open_tokens(path))


def _partition(run: RunFolder, bench: Workbench) -> Partition:
    return bench.keep("partition", run.id, lambda: Partition.load(run.path / "partition.npz"))


def _setup(run: RunFolder, bench: Workbench) -> Setup:
    return bench.keep("setup", run.id, lambda: Setup.read(run))


def _state(run: RunFolder, bench: Workbench, number: int) -> ServerState:
    return bench.keep("state", (run.id, number), lambda: run.read_state(number))


def _model(run: RunFolder, bench: Workbench, state: ServerState, number: int) -> ResidentModel:
    """The resident model on the base that a state has after round `number`."""
    model = _loaded(run, bench)
    model.set_base(state.base, (run.id, number))
    return model


def _loaded(run: RunFolder, bench: Workbench) -> ResidentModel:
    """The resident base model with an adapter attached; the same for all runs on this model, adapter and label set."""
    return bench.keep("model", _model_key(run, bench), lambda: _build(run, bench))


def _model_key(run: RunFolder, bench: Workbench) -> str:
    config = run.config
    adapter = {**config.lora.model_dump(mode="json", exclude={"init"}), "ranks": config.lora.highest_rank}
    adapter["truncation"] = None
    setup = _setup(run, bench)
    return f"{config.task} {config.model.model_dump_json()} {setup.model} {adapter} {list(setup.labels)}"


def _build(run: RunFolder, bench: Workbench) -> ResidentModel:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it would break the lines of a log, or an error's one line
    config, setup, device = run.config, _setup(run, bench), torch.device(bench.device)
    base = provenance.pinned(config.model, setup.model)
    labels = list(setup.labels)
    return ResidentModel.build(run.objective, base, config.lora, labels, setup.pad_token_id, config.seed, device)
