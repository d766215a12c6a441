"""The parts of a configuration that describe the examples, and how they are dealt to the clients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fedlora.sections import Section

PartitionName = Literal[
    "iid", "dirichlet", "shard", "pathological", "one-label", "quantity", "natural-id", "mixed-quality"
]

PARTITIONER_CLASSES: dict[str, str] = {
    "IidPartitioner": "iid",
    "DirichletPartitioner": "dirichlet",
    "ShardPartitioner": "shard",
    "PathologicalPartitioner": "pathological",
    "OneLabelPartitioner": "one-label",
    "QuantityPartitioner": "quantity",
    "NaturalIdPartitioner": "natural-id",
    "MixedQualityPartitioner": "mixed-quality",
}
"""The class names of flwr-datasets (and ours in the same manner), accepted wherever a partition name is."""


class DataConfig(Section):
    """The examples: labelled texts, texts with a number (`task=regression`), or prompts with their responses
    (`task=generation`)."""

    name: str = "wordnet-nouns"
    """A packaged set (`fedlora datasets`), a folder in $FEDLORA_DATA_DIR, a csv, jsonl or parquet file, a folder with
    train and test files, or a name that `datasets.load_dataset` knows."""
    subset: str | None = None
    """Configuration name for `datasets.load_dataset` (`rte` of `glue`, for example)."""
    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text, for tasks on pairs. Empty: one text per example."""
    label: str = "label"
    """Column that holds the label (text or whole numbers), or the number that `task=regression` learns."""
    prompt: str | None = None
    """Column that holds what is asked, for `task=generation`; inside of nested ones with dots (`task.question`,
    `turns.0.text`), as for all columns of this task. Empty: as the set has it (`messages`, or the columns
    `instruction`, `input` and `output`, or `prompt` and `response`)."""
    response: str | None = None
    """Column that holds what is answered, beside `prompt` or `template`."""
    template: str | None = None
    """What is asked, instead of `prompt`: a Jinja template with the columns as names, or `row["any name"]`."""
    messages: str | None = None
    """Column that holds dialogues, instead of `prompt` and `response`: lists of `role` and `content` (or `from` and
    `value`)."""
    tests: str | None = None
    """Column that holds Python statements which fail on a wrong answer. Empty: as the set has it (`test_list` and
    `test_setup_code`, or `test` and `entry_point`)."""
    options: str | None = None
    """Column that holds the answers to choose among, a list in each row."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What becomes of an example with an empty response or prompt: the run is refused, or it is left out."""
    chat_template: Literal["auto", "plain", "chatml"] = "auto"
    """The form that a dialogue gets. `auto`: the model's own chat template, or where its tokenizer has none and each
    dialogue is one question and its answer, `plain` (Alpaca's). `chatml`: ChatML with the tokenizer's own end mark."""
    loss_on: Literal["response", "all"] = "response"
    """What is trained of a dialogue: what the assistant says in every turn, or all of it."""
    too_long: Literal["drop", "cut"] = "drop"
    """What becomes of an example whose response is longer than `max_length`: left out, or cut with its end mark kept.
    A long prompt is cut at its beginning."""
    client: str | None = None
    """Column that names the natural owner of an example; needed by `partition.name=natural-id`, but for sets that have
    natural owners (`fedlora datasets`)."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the examples kept for testing where the source has no test split of its own."""
    train_size: int | None = Field(None, ge=1)
    """Use at most this many training examples, drawn by seed. Empty: all."""
    test_size: int | None = Field(None, ge=1)
    """Use at most this many test examples, drawn by seed. Empty: all."""
    max_length: int = Field(64, ge=4)
    """Longest sequence in tokens; longer texts are cut."""


class PartitionConfig(Section):
    """How the training examples are dealt to the clients."""

    name: PartitionName = "dirichlet"
    """The partitioner; the class names of flwr-datasets are understood too."""
    alpha: float = Field(0.5, gt=0)
    """Concentration: of labels for `dirichlet` and for the skewed clients of `mixed-quality`, of sizes for `quantity`.
    Small is skewed (0.1: few labels per client), 100 is nearly even."""
    min_size: int = Field(10, ge=1)
    """Fewest training examples a client may get; a partition that cannot keep it is refused."""
    labels_per_client: int = Field(2, ge=1)
    """How many labels each client holds under `pathological`, how many shards under `shard`."""
    balanced_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the clients with balanced data under `mixed-quality`; the others are skewed by `alpha`."""
    by: str | None = None
    """Column whose values stand for labels where examples have none (`task=generation`, `task=regression`). For
    dialogues without such a column also `clusters:8`, eight clusters of texts that share words (TF-IDF, k-means), or
    `lengths:4`, responses in four groups by their length."""

    @field_validator("name", mode="before")
    @classmethod
    def _class_names(cls, value: Any) -> Any:
        return PARTITIONER_CLASSES.get(value, value) if isinstance(value, str) else value
