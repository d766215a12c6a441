"""What the JSON files of a run folder say, as values: written and read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedlora.adapter.divergence import Divergence
from fedlora.files.limits import short
from fedlora.metrics import Bytes
from fedlora.model.provenance import Origin
from fedlora.objective import Scores

if TYPE_CHECKING:
    from fedlora.run.runfolder import RunFolder

SETUP = "setup.json"
_LARGEST = 2**63
"""Beyond it is no number that a client can have counted or measured."""


@dataclass(frozen=True)
class DataRead:
    """Which data a run is on."""

    name: str
    origin: str
    digest: str
    read: tuple[str, ...] = ()
    """What its reader did, a remark each."""


@dataclass(frozen=True)
class Setup:
    """What is known once the data is prepared (`setup.json`)."""

    tokens: Path
    """The tokenised data."""
    labels: tuple[str, ...]
    pad_token_id: int
    padding_side: str
    data: DataRead
    examples: dict[Literal["train", "test"], int]
    model: Origin | None = None
    """Where the base model's files are from, where that is known."""
    notes: tuple[str, ...] = ()
    """What a person should know of how the data was dealt."""

    @classmethod
    def read(cls, run: RunFolder) -> Setup:
        """Raises:
        RunFolderError: it is missing or damaged.
        """
        return cls._of(run.need_json(SETUP))

    @classmethod
    def known(cls, run: RunFolder) -> Setup | None:
        """The same, or None where it is missing or damaged."""
        content = run.read_json(SETUP)
        return cls._of(content) if isinstance(content, dict) else None

    def write(self, run: RunFolder) -> None:
        content = {**asdict(self), "tokens": str(self.tokens), "labels": list(self.labels), "notes": list(self.notes)}
        run.write_json(SETUP, content)

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Setup:
        known = _known(cls, content)
        data = DataRead(**_known(DataRead, known["data"]))
        return cls(**known | {"tokens": Path(known["tokens"]), "labels": tuple(known["labels"]), "data": data})


@dataclass(frozen=True)
class ClientRecord:
    """What a client says of its training, beside its adapter (`client-NNN.json`)."""

    round: int
    client: int
    ticket: str
    """What the server gave it with the request: of another round, the update is a replay."""
    examples: int
    """Rows that it trained on."""
    rank: int
    """The highest of the modules that it uploads."""
    losses: list[float]
    """Mean cross-entropy of every step, in nats."""
    seconds: float
    """Of training; of clients that are trained together, each has an equal part."""
    bytes: Bytes
    validation: Scores | None
    """On rows held out of its training, where ranks grow by them."""
    local: Scores | None
    """On its own test rows, after training."""
    memory: int | None = None
    """Peak of training in bytes, of its GPU or process (`fedlora.training.memory`), with all who are trained together;
    not said by earlier versions."""
    tokens: int | None = None
    """Tokens that are trained in its rows; None where they have labels."""

    def to_json(self) -> dict[str, Any]:
        scores = {name: found and found.to_json() for name, found in self._scores().items()}
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "bytes": asdict(self.bytes), **scores}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], kind: type[Scores]) -> ClientRecord:
        """With scores of a kind, which is the objective's.

        Raises:
        KeyError, TypeError, ValueError: it does not say what it should.
        """
        said = {each.name: content[each.name] for each in fields(cls) if each.name not in _MAY_LACK}
        said |= {name: content.get(name) for name in _MAY_LACK}
        counts = {name: said[name] for name in ("round", "client", "examples", "rank")} | said["bytes"]
        counts |= {name: said[name] for name in _MAY_LACK if said[name] is not None}
        measured = {f"losses[{step}]": loss for step, loss in enumerate(said["losses"])} | {"seconds": said["seconds"]}
        for name, value in (counts | measured).items():
            kinds = (int,) if name in counts else (int, float)
            if type(value) not in kinds or not abs(value) < _LARGEST or (name in counts and value < 0):
                raise ValueError(f"{name} is {short(value)}")
        for name in ("validation", "local"):
            said[name] = None if said[name] is None else kind.from_json(said[name])
        if said["validation"] and not said["validation"].examples:
            raise ValueError("validation is on no examples")
        return cls(**said | {"losses": list(said["losses"]), "bytes": Bytes(**said["bytes"])})

    def _scores(self) -> dict[str, Scores | None]:
        return {"validation": self.validation, "local": self.local}


_MAY_LACK = ("memory", "tokens")
"""What a client need not say."""


@dataclass(frozen=True)
class Outcome:
    """What came of a round on the server (`state.json`, beside the strategy's state)."""

    divergence: Divergence
    bytes: Bytes
    """Everything that crossed the wire in the round, in vain or not."""
    read_seconds: float | None = None
    """Reading and verifying the updates, and the state where this process has not made it."""
    seconds: float = 0.0
    """Aggregation alone."""
    divergence_seconds: float | None = None
    memory: int | None = None
    """Peak of all this in bytes, of the process that does it (`fedlora.training.memory`)."""

    def to_json(self) -> dict[str, Any]:
        measured = ("read_seconds", "seconds", "divergence_seconds", "memory")
        taken = {name: getattr(self, name) for name in measured}
        return {"divergence": self.divergence.to_json(), "bytes": asdict(self.bytes), **taken}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Outcome:
        """What an earlier version did not measure is None."""
        divergence = Divergence.from_json(content["divergence"])
        return cls(**_known(cls, content) | {"divergence": divergence, "bytes": Bytes(**content["bytes"])})


@dataclass(frozen=True)
class Part:
    """A piece of what is scored after a round: rows of the test set from `start` on, every `step`-th, by one model."""

    split: Literal["global", "local", "probe", "answers"]
    client: int | None = None
    """Whose model; empty for the global one."""
    start: int = 0
    step: int = 1
    stem: str = ""
    """Of a probe: where its adapter is."""
    metric: str = ""
    """Of a probe: the metric that its accuracy is."""


def total(parts: Iterable[Bytes]) -> Bytes:
    """What crossed the wire, all together."""
    found = [asdict(part) for part in parts]
    return Bytes(**{each.name: sum(part[each.name] for part in found) for each in fields(Bytes)})


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields, without what a file says besides."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
