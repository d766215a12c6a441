"""Everything that describes a run, in one typed place: the source of the YAML files, the dotted keys of the
command line and of a flow's `overrides`, the parameters in MLflow and the table in the docs.

A value is set in one place and changes nothing else: no default depends on another value, but for pairs of keys that
say the same in two ways (`INSTEAD_OF`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedlora.config import addresses
from fedlora.config.channel import ChannelConfig
from fedlora.config.data import DataConfig, PartitionConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.lora import LoraConfig
from fedlora.config.model import ModelConfig
from fedlora.errors import counted
from fedlora.sections import Section
from fedlora.strategies import registry

INSTEAD_OF = {
    "training.local_steps": "training.local_epochs",
    "training.local_epochs": "training.local_steps",
}
"""Keys that say the same in two ways: setting one unsets the other (`configfile.layered`)."""


class TrainingConfig(Section):
    """What one client does in one round."""

    local_steps: int | None = Field(20, ge=1)
    """Optimiser steps per round. Setting it unsets `local_epochs`; both in one place are refused."""
    local_epochs: float | None = Field(None, gt=0)
    """Passes over the client's data per round. Setting it unsets `local_steps`; both in one place are refused."""
    batch_size: int = Field(16, ge=1)
    """Examples per forward pass; per step, where gradients are not accumulated."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per step: a step is over this many times `batch_size` examples, exactly as if they were one batch,
    in the memory of one pass."""
    packing: bool = False
    """Several examples in one row, each seeing itself alone, so that less is computed for padding (`task=generation`).
    Refused where the model's attention does not keep them apart."""
    learning_rate: float = Field(5e-3, gt=0)
    """Peak learning rate."""
    final_learning_rate: float | None = Field(None, gt=0)
    """Let the peak fall over the rounds, along a cosine, from `learning_rate` to this in the last one. Empty: the same
    in every round."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Made afresh for every client in every round: no optimiser state outlives a round."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled for `adamw`."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """For `sgd`."""
    warmup_steps: int = Field(5, ge=0)
    """Steps over which the learning rate rises linearly, at the start of each client's round."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm. Empty: no clipping."""
    cohort: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Clients whose batches go through the frozen base in one pass, each with an adapter of its own: for GPUs, which a
    client of a small model leaves idle. The numbers are those of one by one but for the order of sums. `auto`: as many
    as this machine is fastest with, measured once for a model and kept. Where a model does not allow it, clients are
    trained one by one, which is said with the reason."""

    @property
    def step_size(self) -> int:
        """Examples per step."""
        return self.batch_size * self.gradient_accumulation

    def in_round(self, number: int, rounds: int) -> TrainingConfig:
        """What a client does in round `number` of so many: with its learning rate."""
        if self.final_learning_rate is None:
            return self
        highest, lowest = self.learning_rate, self.final_learning_rate
        rate = lowest + (highest - lowest) * (1 + math.cos(math.pi * number / rounds)) / 2
        return self.model_copy(update={"learning_rate": rate, "final_learning_rate": None})

    @model_validator(mode="before")
    @classmethod
    def _one_unsets_the_other(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        pairs = ((key.partition(".")[2], other.partition(".")[2]) for key, other in INSTEAD_OF.items())
        unset = {other: None for key, other in pairs if values.get(key) is not None and other not in values}
        return {**values, **unset}

    @model_validator(mode="after")
    def _falls(self) -> TrainingConfig:
        if self.final_learning_rate is not None and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate={self.final_learning_rate:g} is above learning_rate={self.learning_rate:g}; "
                "the rate falls, so set one at most as high"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainingConfig:
        if (self.local_steps is None) == (self.local_epochs is None):
            cure = (
                "neither is set; set one of them"
                if self.local_steps is None
                else "both are set in one place; leave one of them out"
            )
            raise ValueError(f"exactly one of local_steps and local_epochs says how long a client trains, and {cure}")
        return self


class EvaluationConfig(Section):
    """What is measured after each round."""

    every: int = Field(1, ge=1)
    """Evaluate the global model every N rounds; before round one and after the last it always is."""
    local: bool = True
    """Also evaluate each client's own model, after its training, on test examples with its own label distribution."""
    batch_size: int = Field(64, ge=1)
    """Examples per forward pass."""
    execute_code: bool = False
    """Allow the scorer `code` to run Python that the model has written, with limits and, where the kernel allows it,
    without network (`docs/howto/read-answers.md`)."""
    generate: GenerateConfig = GenerateConfig()


class RunnerConfig(Section):
    """Where clients are trained."""

    kind: Literal["processes", "threads", "ray", "dask"] = "processes"
    """`processes`: worker processes, each with its own resident base model. `threads`: in this process, one client at a
    time on each device; no start-up cost. `ray`, `dask`: processes of a cluster, which needs no shared disk
    (`docs/howto/use-a-cluster.md`); extras of the same names."""
    slots: int | None = Field(None, ge=1)
    """Clients trained side by side. Empty: one per GPU, or one per CPU core (at most 8) without GPU; on a cluster with
    an address, as many as it has room for."""
    address: str | None = None
    """Of the cluster, as `host:port` (`ray://host:port` from outside a cluster of Ray's). Empty: a local one, which is
    started for the run and ends with it."""
    gpus_per_client: float = Field(0.0, ge=0)
    """GPUs of the cluster that a client has while it trains; four clients share one at 0.25."""
    cpus_per_client: float = Field(1.0, gt=0)
    """Cores of the cluster that a client has while it trains; how many it computes with says `threads`."""
    shared_files: bool = True
    """Workers of a cluster read files of the run where this machine has them, if they see the very same there; `false`:
    they fetch them in any case."""
    device: str = "auto"
    """`auto` (every GPU there is, else the CPU), `cpu`, `cuda`, `cuda:0`, `mps`."""
    threads: int = Field(1, ge=1)
    """CPU threads per worker process. Part of what fixes the bits of a result; one is the fastest on shared cores."""
    exclusive: bool | None = None
    """Keep a device for one client at a time across all runs, by a strict Prefect concurrency limit per device. Empty:
    yes for GPUs, no for the CPU."""
    retries: int = Field(2, ge=0)
    """How often a client is tried again, with growing pauses, when its worker fails."""
    group_s: float = Field(2.0, ge=0)
    """Seconds of work that are handed to a worker at a time: clients that take less travel in groups, each a task run
    of Prefect's. A client stays what is saved, tried again and counted. 0: each client alone."""
    timeout_s: float | None = Field(None, gt=0)
    """Seconds after which a worker process that trains a client is taken for hung and ended (then `retries` apply); of
    several together, as many times that. Empty: wait for it. Needs `runner.kind=processes`."""

    @model_validator(mode="after")
    def _of_cluster(self) -> RunnerConfig:
        if self.clustered:
            if self.exclusive:
                raise ValueError(
                    "exclusive=true guards devices of this machine; on a cluster a client has what *_per_client say"
                )
            if self.device.partition(":")[2]:
                raise ValueError(f"device={self.device} names a GPU, and kind={self.kind} says itself which; set cuda")
            if self.device == "cpu" and self.gpus_per_client:
                raise ValueError(f"gpus_per_client={self.gpus_per_client:g} is not for device=cpu; set device=auto")
            if self.device == "cuda" and not self.gpus_per_client:
                raise ValueError("device=cuda on a cluster needs gpus_per_client, for example 1 or 0.25")
            return self
        usual = RunnerConfig.model_fields
        for name in ("address", "gpus_per_client", "cpus_per_client", "shared_files"):
            if (value := getattr(self, name)) != usual[name].default:
                raise ValueError(f"{name}={value} is for kind=ray and kind=dask, and kind is {self.kind}")
        return self

    @property
    def clustered(self) -> bool:
        """Whether clients are trained by an engine that may span machines."""
        return self.kind in ("ray", "dask")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        kind, _, index = value.partition(":")
        plain = kind in ("auto", "cpu", "mps", "cuda") and not index
        if not (plain or (kind == "cuda" and index.isdigit())):
            raise ValueError("expected auto, cpu, cuda, cuda:N or mps")
        return value


class TrackingConfig(Section):
    """What MLflow keeps."""

    experiment: str = Field("fedlora", min_length=1)
    """MLflow experiment that the run is logged to."""
    uri: str | None = None
    """Tracking store, without password. Empty: $MLFLOW_TRACKING_URI, else a server of `fedlora up`, else the local
    SQLite file."""
    adapter_every: int | None = Field(None, ge=1)
    """Also log the global adapter every N rounds. Empty: the final adapter only."""

    @field_validator("uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value and addresses.holds_secret(value):  # of this type, because others are shown with the value
            raise PydanticCustomError("secret", f"tracking.uri holds a password; {addresses.advice(value)}")
        return value


class RunConfig(Section):
    """One federated run."""

    name: str | None = None
    """A label for people; the run is named after its strategy and seed without it."""
    task: str = "classification"
    """What is learned, and how it is scored (`fedlora.objective`)."""
    strategy: str = "fedit"
    """How the server combines and broadcasts adapters (`fedlora strategies`)."""
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the strategy (`fedlora strategies` lists them)."""
    rounds: int = Field(8, ge=1)
    """Federated rounds."""
    clients: int = Field(10, ge=1)
    """Clients among whom the training data is dealt."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients that take part in a round, drawn by seed; at least one."""
    weighting: Literal["examples", "tokens", "uniform"] = "examples"
    """Weight of a client in every mean: its share of the examples, of the tokens that are trained in them
    (`task=generation`), or the same for all."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    keep_rounds: int | None = Field(2, ge=1)
    """Rounds whose uploads and server states stay in the run folder: the points to which a damaged run can go back.
    Metrics, tables and the final adapter always stay. Empty: all rounds."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    channel: ChannelConfig = ChannelConfig()
    runner: RunnerConfig = RunnerConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        if value not in registry.names():
            raise ValueError(f"unknown strategy; known: {', '.join(registry.names())}")
        return value

    @model_validator(mode="after")
    def _possible_together(self) -> RunConfig:
        if self.training.momentum and self.training.optimizer != "sgd":
            raise ValueError("training.momentum is for training.optimizer=sgd; adamw has moments of its own")
        if self.runner.device in ("cpu", "mps") and self.runner.kind == "threads" and (self.runner.slots or 1) > 1:
            raise ValueError(
                "runner.kind=threads trains one client at a time on each device (one random stream per device), "
                "so runner.slots above 1 needs runner.kind=processes"
            )
        if self.model.quantization == "int8" and self.lora.variant == "dora":
            raise ValueError("lora.variant=dora does not train on model.quantization=int8; take nf4 or another variant")
        if isinstance(self.lora.ranks, list) and len(self.lora.ranks) != self.clients:
            raise ValueError(
                f"lora.ranks lists {counted(len(self.lora.ranks), 'rank')} for clients={self.clients}; one per client"
            )
        self._check_channel()
        registry.check_options(self.strategy, self.strategy_options)
        lora, svd_order = self.lora, self.lora.truncation == "svd"
        if lora.variant in ("dora", "hira") or lora.mixed_ranks or svd_order:
            registry.check_combination(self.strategy, lora.variant, lora.mixed_ranks, svd_order)
        return self

    def _check_channel(self) -> None:
        channel, most = self.channel, self.clients_per_round
        if channel.min_clients > most:
            raise ValueError(f"channel.min_clients={channel.min_clients}, but a round has {counted(most, 'client')}")
        if channel.over_selection and most == self.clients:
            raise ValueError(
                f"channel.over_selection={channel.over_selection:g} asks for more clients than a round needs, but a "
                f"round already has all {most}; set fraction below one"
            )
        if channel.deadline_s and channel.faults.delay == "none":
            raise ValueError(
                f"channel.deadline_s={channel.deadline_s:g} looks at virtual delays, and there are none; set "
                "channel.faults.delay (for workers that hang there is runner.timeout_s)"
            )
        if self.runner.timeout_s and self.runner.kind != "processes":
            raise ValueError("runner.timeout_s ends a worker process, so it needs runner.kind=processes")

    @property
    def clients_asked(self) -> int:
        """How many clients are asked in a round: with over-selection, more than take part."""
        return min(self.clients, math.ceil(self.clients_per_round * (1 + self.channel.over_selection) - 1e-9))

    @property
    def clients_per_round(self) -> int:
        """How many clients take part in a round."""
        return max(1, round(self.fraction * self.clients))

    def digest(self) -> str:
        """Hash of everything that decides the run's numbers: equal digests mean equal results on one machine."""
        content = self.model_dump(mode="json", exclude={"tracking"})
        for dotted in NEUTRAL:
            *sections, last = dotted.split(".")
            del reduce(getitem, sections, content)[last]
        usual = RunConfig().model_dump(mode="json")
        for *sections, last in _LATER:
            place, same = (reduce(getitem, sections, each) for each in (content, usual))
            if place[last] == same[last]:
                del place[last]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_LATER = [
    key.split(".")
    for key in (
        *("channel", "model.trust_remote_code", "task"),
        "training.final_learning_rate",
        *("evaluation.generate", "evaluation.execute_code"),
        *("lora.exclude_modules", "lora.init"),
        *("model.quantization", "model.gradient_checkpointing", "model.attention"),
        *("data.prompt", "data.response", "data.loss_on", "data.too_long", "partition.by"),
        *("data.chat_template", "training.gradient_accumulation", "training.packing"),
        "training.cohort",
        *("data.template", "data.messages", "data.tests", "data.options", "data.empty"),
    )
]
"""Keys and sections that came later, and are no part of the digest while they have their defaults: so that runs made
before are found again."""

NEUTRAL = (
    "name",
    "runner.kind",
    "runner.slots",
    "runner.exclusive",
    "runner.retries",
    "runner.timeout_s",
    "runner.group_s",
    "runner.address",
    "runner.gpus_per_client",
    "runner.cpus_per_client",
    "runner.shared_files",
    "keep_rounds",
)
"""Keys that change neither the numbers of a run nor where it is logged."""
