"""Text as tokens: made once, kept in a cache that all runs and all worker processes share, mapped into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedlora.data import questions
from fedlora.data.sources import LabelledText
from fedlora.data.turns import IGNORED, Turns
from fedlora.errors import DataError

if TYPE_CHECKING:  # a light caller may only want the names here
    import pyarrow as pa

_ROWS_AT_A_TIME = 1_000
_FORMAT = 2


class Padding(NamedTuple):
    """What shorter texts of a batch are filled up with, and on which side."""

    token: int
    side: str = "right"


@dataclass(frozen=True)
class TokenisedData:
    """A tokenised set on disk. The splits have the columns `input_ids`, `length`, `label` and, where there is such a
    thing, `token_type_ids`, `targets`, `value`, `client` and what `fedlora.data.questions` adds; nothing is padded."""

    path: Path
    labels: tuple[str, ...]
    name: str
    origin: str
    digest: str
    """Hash of the text (not of the tokens): equal for two models on the same data."""
    pad_token_id: int
    padding_side: str
    train: pa.Table
    test: pa.Table
    notes: tuple[str, ...] = ()
    """What did not fit into so many tokens, a line each."""

    @property
    def padding(self) -> Padding:
        """As the tokenizer has it."""
        return Padding(self.pad_token_id, self.padding_side)


@dataclass(frozen=True)
class Examples:
    """Some rows of a split in memory: ragged token ids and targets (int32), labels and lengths (int64)."""

    input_ids: list[npt.NDArray[np.int32]]
    token_type_ids: list[npt.NDArray[np.int32]] | None
    labels: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    targets: list[npt.NDArray[np.int32]] | None = None
    """Of dialogues: the token ids that are to be predicted, `turns.IGNORED` elsewhere."""
    values: npt.NDArray[np.float32] | None = None
    """The numbers that are learned, where these are such."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> Examples:
        """The first so many of them."""
        return replace(self, **{name: rows[:count] for name, rows in vars(self).items() if rows is not None})


def tokenise(text: LabelledText, tokenizer: Any, max_length: int, cache: Path, turns: Turns | None = None) -> Path:
    """The folder `cache/tokens-<digest>` with the tokens of both splits, made now unless it is there already.

    Texts (pairs of texts) are cut to `max_length` tokens; dialogues become tokens by `turns`, which may leave some out.
    The folder appears complete or not at all, so several processes may ask for it at the same time; a damaged one is
    made again.

    Raises:
        DataError: the cache cannot be written, or nothing is left of a split.
    """
    meta = _describe(text, tokenizer)
    path = cache / f"tokens-{_digest(meta, tokenizer, max_length, turns)}"
    if _is_complete(path):
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(cache) as folder:
            sizes = {}
            options = questions.options_of(text.tables["train"]) if turns else []
            for split in ("train", "test"):
                table = text.tables[split]
                asked = options if split == "test" else None
                found = _turned(table, turns, asked) if turns else _encoded(table, tokenizer, max_length, meta)
                sizes[split] = _write(folder / f"{split}.arrow", found)
                if not sizes[split]:
                    raise DataError(
                        f"{text.name}: {split} has no example left. {'; '.join(turns.notes() if turns else ())}"
                    )
            meta = replace(meta, sizes=sizes, notes=turns.notes() if turns else [])
            (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
            _publish(folder, path)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {path}: {error.strerror or error}. "
            "Set FEDLORA_HOME to a folder that can be written and has space"
        ) from error
    return path


def open_tokens(path: Path) -> TokenisedData:
    """A tokenised set, mapped into memory: opening costs milliseconds, whatever its size.

    Raises:
        DataError: there is no such folder, or something in it is missing or damaged.
    """
    import pyarrow as pa

    try:
        meta = _Meta(**json.loads((path / "meta.json").read_text(encoding="utf-8")))
        splits = {split: _mapped(path / f"{split}.arrow") for split in ("train", "test")}
        sizes = {split: len(data) for split, data in splits.items()}
        if meta.format != _FORMAT or meta.sizes != sizes:
            raise ValueError(f"it holds {sizes}, expected {meta.sizes}")
        about = (meta.name, meta.origin, meta.digest, meta.pad_token_id, meta.padding_side)
        return TokenisedData(path, tuple(meta.labels), *about, **splits, notes=tuple(meta.notes))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        state = "is damaged" if path.is_dir() else "does not exist"
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"the tokenised data {path} {state} ({reason}); run again and it is made from the text once more"
        ) from error


def label_array(split: pa.Table) -> npt.NDArray[np.int64]:
    """The label of every row (class indices, int64)."""
    labels: npt.NDArray[np.int64] = split["label"].to_numpy()
    return labels


def highest(data: TokenisedData) -> int:
    """The highest token id in both splits, padding included."""
    chunks = (chunk for split in (data.train, data.test) for chunk in split["input_ids"].chunks)
    return max(data.pad_token_id, *(int(chunk.flatten().to_numpy().max(initial=0)) for chunk in chunks))


def trained_tokens(examples: Examples) -> int | None:
    """How many tokens are to be predicted in all of them; None where they have labels instead."""
    if examples.targets is None:
        return None
    return sum(int((target[1:] != IGNORED).sum()) for target in examples.targets)


def client_array(split: pa.Table) -> list[str] | None:
    """The natural owner of every row, or None where the set has none."""
    return split["client"].to_pylist() if "client" in split.column_names else None


def examples(split: pa.Table, indices: npt.ArrayLike) -> Examples:
    """The rows at `indices`, in that order, copied out of the mapped file.

    Raises:
        DataError: an index outside the split.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(split)):
        raise DataError(
            f"the partition asks for row {rows.max() if rows.max() >= len(split) else rows.min()} of a split with "
            f"{len(split)} rows; the partition was made for other data"
        )
    if not len(rows):
        return Examples([], None, np.zeros(0, np.int64), np.zeros(0, np.int64))
    table = _taken(split, rows)
    types, targets = (
        _ragged(table[name]) if name in table.column_names else None for name in ("token_type_ids", "targets")
    )
    return Examples(
        _ragged(table["input_ids"]),
        types,
        table["label"].to_numpy().astype(np.int64),
        table["length"].to_numpy().astype(np.int64),
        targets,
        table["value"].to_numpy() if "value" in table.column_names else None,
    )


def _taken(split: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Some rows, in that order. Batch by batch: `Table.take` may copy a whole column of lists first."""
    import pyarrow as pa

    order = np.argsort(rows, kind="stable")
    batches, wanted = split.to_batches(), rows[order]
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    cuts = np.searchsorted(wanted, starts)
    parts = [
        batch.take(wanted[begin:end] - start)
        for batch, start, begin, end in zip(batches, starts[:-1], cuts[:-1], cuts[1:], strict=True)
        if end > begin
    ]
    return pa.Table.from_batches(parts).take(np.argsort(order))


def _ragged(column: Any) -> list[npt.NDArray[np.int32]]:
    lists = column.combine_chunks()
    ends = np.cumsum(lists.value_lengths().to_numpy())
    return np.split(lists.flatten().to_numpy(), ends[:-1])


@dataclass(frozen=True)
class _Meta:
    """What is worth knowing about a tokenised set without opening it (`meta.json`)."""

    format: int
    name: str
    origin: str
    digest: str
    labels: list[str]
    sizes: dict[str, int]
    columns: list[str]
    pad_token_id: int
    padding_side: str
    notes: list[str] = field(default_factory=list)


def _describe(text: LabelledText, tokenizer: Any) -> _Meta:
    have = text.tables["train"].column_names
    paired = "text_pair" in have
    types = paired and "token_type_ids" in tokenizer.model_input_names
    columns = ["input_ids", *(["token_type_ids"] if types else []), "label", "length"]
    columns += ["targets"] if "messages" in have else []
    columns += ["value"] if "value" in have else []
    # Models without a padding token never look at the positions that it fills: any id will do.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    columns += ["client"] if "client" in have else []
    sizes: dict[str, int] = {split: len(table) for split, table in text.tables.items()}
    about = (text.name, text.origin, text.digest, list(text.labels))
    return _Meta(_FORMAT, *about, sizes, columns, pad, tokenizer.padding_side)


def _digest(meta: _Meta, tokenizer: Any, max_length: int, turns: Turns | None) -> str:
    described = {name: value for name, value in asdict(meta).items() if name != "notes"}
    how = [turns.described(), "asked"] if turns else []
    content = json.dumps([described, max_length, _tokenizer_content(tokenizer), *how], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _tokenizer_content(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return _lasting(backend.to_str())


@lru_cache(maxsize=4)  # a fifth of a second for BERT's vocabulary, for each run of a sweep
def _lasting(serialised: str) -> str:
    """Digest of a tokenizer without what is a setting of its last call: a used one would have another."""
    content = {name: value for name, value in json.loads(serialised).items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _encoded(split: pa.Table, tokenizer: Any, max_length: int, meta: _Meta) -> Iterator[pa.Table]:
    import pyarrow as pa

    paired = "text_pair" in split.column_names
    for start in range(0, len(split), _ROWS_AT_A_TIME):
        rows = split.slice(start, _ROWS_AT_A_TIME)
        texts, pairs = rows["text"].to_pylist(), rows["text_pair"].to_pylist() if paired else None
        found = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
        # A decoder's tokenizer makes nothing of an empty text, and a model needs at least one position.
        ids: Sequence[Sequence[int]] = [row or [meta.pad_token_id] for row in found["input_ids"]]
        columns = {"input_ids": pa.array(ids, pa.list_(pa.int32()))}
        if "token_type_ids" in meta.columns:
            columns["token_type_ids"] = pa.array(found["token_type_ids"], pa.list_(pa.int32()))
        columns["label"] = rows["label"].cast(pa.int64())
        columns["length"] = pa.array([len(row) for row in ids], pa.int32())
        if "value" in meta.columns:
            columns["value"] = rows["value"].cast(pa.float32())
        if "client" in meta.columns:
            columns["client"] = rows["client"].cast(pa.string())
        yield pa.table(columns)


def _turned(split: pa.Table, turns: Turns, options: Sequence[str] | None) -> Iterator[pa.Table]:
    """Dialogues as tokens; where there are options, even none, as questions too."""
    import pyarrow as pa

    for start in range(0, len(split), _ROWS_AT_A_TIME):
        rows = split.slice(start, _ROWS_AT_A_TIME)
        found = turns.encode(rows["messages"].to_pylist())
        rows = rows.filter(pa.array([each is not None for each in found]))
        ids, targets = ([each[part] for each in found if each is not None] for part in (0, 1))
        columns = {"input_ids": pa.array(ids, pa.list_(pa.int32())), "targets": pa.array(targets, pa.list_(pa.int32()))}
        columns |= {"label": rows["label"], "length": pa.array([len(row) for row in ids], pa.int32())}
        if "client" in rows.column_names:
            columns["client"] = rows["client"].cast(pa.string())
        if options is not None:
            columns |= questions.columns(rows, turns, options)
        yield pa.table(columns)


def _write(file: Path, tables: Iterator[pa.Table]) -> int:
    """At least one table, piece by piece, as an Arrow stream, which `datasets.Dataset.from_file` reads too; how many
    rows these are."""
    import pyarrow as pa

    first, written = next(tables), 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as stream:
        for table in itertools.chain([first], tables):
            stream.write_table(table)
            written += len(table)
    return written


def _mapped(file: Path) -> pa.Table:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _is_complete(path: Path) -> bool:
    if not (path / "meta.json").is_file():
        return False
    try:
        open_tokens(path)
    except DataError:
        return False
    return True


def _publish(folder: Path, path: Path) -> None:
    """Give a finished folder its name, unless another process was faster; a damaged one makes way."""
    for _ in range(3):
        try:
            folder.rename(path)
            return
        except OSError:
            if _is_complete(path):
                return
            if not path.exists():
                raise
            shutil.rmtree(path, ignore_errors=True)
    folder.rename(path)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="making-tokens-", dir=parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
