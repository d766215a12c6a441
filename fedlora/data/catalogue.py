"""What a data name means, without reading any data: the sets with a name of their own, and how other names resolve."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedlora.config import DataConfig
from fedlora.errors import DataError, did_you_mean
from fedlora.files import home

Origin = Literal["packaged", "file", "folder", "hub"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Kinds of files that are understood, and the order in which a folder is searched for them."""
VALIDATION = ("validation", "valid", "val", "dev", "validation_matched")
"""Splits that are used for testing where there is none of that name, in this order."""

HUB_ALIASES = {
    "ag_news": "fancyzhx/ag_news",
    "amazon_polarity": "fancyzhx/amazon_polarity",
    "dbpedia_14": "fancyzhx/dbpedia_14",
    "emotion": "dair-ai/emotion",
    "glue": "nyu-mll/glue",
    "imdb": "stanfordnlp/imdb",
    "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
    "snli": "stanfordnlp/snli",
    "sst2": "stanfordnlp/sst2",
    "trec": "CogComp/trec",
    "tweet_eval": "cardiffnlp/tweet_eval",
    "yelp_polarity": "fancyzhx/yelp_polarity",
}
"""Old names without owner that people still type."""


@dataclass(frozen=True)
class Entry:
    """A named set: where it can come from, and which columns it has there when they are not `text` and `label`."""

    summary: str
    folder: str | None = None
    """Its folder in $FEDLORA_DATA_DIR."""
    hub: str | None = None
    subset: str | None = None
    packaged: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    """Our column → the column in a local copy; `template` is one (`data.template`)."""
    hub_columns: dict[str, str] = field(default_factory=dict)
    """Our column → the column on the hub."""


_MBPP = {
    "template": "{{ row.get('text') or row.prompt }}\n\n"
    "Your code should pass these tests:\n\n{{ test_list | join('\\n') }}",
    "response": "code",
}
_TASKS = {"template": "{{ definition }}\n\n{{ inputs }}", "response": "targets", "client": "task_name"}

CATALOGUE: dict[str, Entry] = {
    "wordnet-nouns": Entry("10,000 noun definitions, 20 kinds of things; comes with fedlora", packaged=True),
    "wordnet-definitions": Entry(
        "9,400 nouns to define (task=generation), 22 natural clients; comes with fedlora",
        packaged=True,
        columns={"client": "kind"},
    ),
    "wordnet-nouns-full": Entry("79,000 noun definitions, 20 kinds of things", folder="wordnet-nouns"),
    "ag-news": Entry("news items, 4 topics", folder="ag-news-7600", hub="fancyzhx/ag_news"),
    "banking77": Entry("13,000 questions to a bank, 77 intents", folder="banking77", hub="PolyAI/banking77"),
    "alpaca-gpt4": Entry("52,000 instructions answered by GPT-4", folder="alpaca-gpt4", hub="vicgalle/alpaca-gpt4"),
    "dolly-15k": Entry(
        "15,000 instructions answered by people; 8 categories are natural clients",
        folder="dolly-15k",
        hub="databricks/databricks-dolly-15k",
        columns={"client": "category"},
        hub_columns={"client": "category"},
    ),
    "gsm8k": Entry(
        "8,800 sums in words, with the way to the answer", folder="gsm8k", hub="openai/gsm8k", subset="main"
    ),
    "mbpp": Entry(
        "970 small programs to write, with tests",
        folder="mbpp",
        hub="google-research-datasets/mbpp",
        subset="full",
        columns=_MBPP,
        hub_columns=_MBPP,
    ),
    "natural-instructions": Entry(
        "1,600 tasks with instructions, millions of rows (set data.train_size); tasks are natural clients",
        folder="natural-instructions",
        hub="Muennighoff/natural-instructions",
        columns=_TASKS,
        hub_columns=_TASKS,
    ),
    "newsgroups-20": Entry(
        "19,000 postings, 20 newsgroups",
        folder="newsgroups-20",
        hub="SetFit/20_newsgroups",
        hub_columns={"label": "label_text"},
    ),
    "reuters-r8": Entry("7,700 newswire stories, 8 topics, half of them one topic", folder="reuters-r8"),
    "rte": Entry(
        "2,800 pairs of texts: does the first entail the second?",
        folder="rte",
        hub="nyu-mll/glue",
        subset="rte",
        columns={"text_pair": "text_pair"},
        hub_columns={"text": "sentence1", "text_pair": "sentence2"},
    ),
    "spamassassin": Entry("5,900 e-mails, spam or not", folder="spamassassin"),
    "vader": Entry("19,000 texts, positive or negative; column `domain` (4) names natural clients", folder="vader"),
}


@dataclass(frozen=True)
class KnownSet:
    """A line of `fedlora datasets`."""

    name: str
    summary: str
    origin: str
    """`packaged`, `data-dir` (a folder in $FEDLORA_DATA_DIR) or a hub id."""
    available: bool
    """It can be read here without a network."""


@dataclass(frozen=True)
class Source:
    """What a data name resolves to."""

    name: str
    origin: Origin
    path: Path | None = None
    hub: str | None = None
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def known() -> list[KnownSet]:
    """The named sets and the other folders of $FEDLORA_DATA_DIR that hold train and test files."""
    named = [_known(name, entry) for name, entry in CATALOGUE.items()]
    taken = {entry.folder for entry in CATALOGUE.values()} | set(CATALOGUE)
    return named + [
        KnownSet(folder.name, "your folder in $FEDLORA_DATA_DIR", "data-dir", True)
        for folder in _data_folders()
        if folder.name not in taken
    ]


def check(config: DataConfig) -> None:
    """Refuse a data name that means nothing, before any work starts; reads no data and uses no network.

    Raises:
        DataError: no set, folder, file or hub id of that name, or a subset of something that has none.
    """
    resolve(config)


def check_owners(config: DataConfig, partition: str) -> None:
    """Refuse a partition by owner of a set for which no owners are named; reads no data and uses no network.

    Raises:
        DataError: as `check`, and where owners are needed and not named.
    """
    if partition == "natural-id" and config.client is None and "client" not in resolve(config).columns:
        raise DataError("partition.name=natural-id needs data.client, the column that names each example's owner")


def resolve(config: DataConfig) -> Source:
    """Where the text comes from: a named set, a folder of $FEDLORA_DATA_DIR, a path, or a hub id, in this order.

    Raises:
        DataError: nothing of that name, with the nearest name that there is.
    """
    source = _named(config.name) or _local(config.name) or _on_hub(config)
    if source is None:
        raise DataError(_unknown(config.name))
    if config.subset is not None and source.hub is None:
        raise DataError(
            f"data.subset={config.subset!r} selects a part of a hub set, and {config.name!r} is a {source.origin} "
            "set; leave data.subset empty"
        )
    if config.subset is not None and source.subset not in (None, config.subset):
        raise DataError(
            f"data.subset={config.subset!r} with data.name={config.name!r}, which stands for subset "
            f"{source.subset!r} of {source.hub}; leave data.subset empty, or set data.name={source.hub}"
        )
    return source


@dataclass(frozen=True)
class Files:
    """The files of a folder by split; several where a split comes in numbered parts."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    """Empty: the training files are numbered parts, which have no one path to give instead, and one is drawn."""
    notes: tuple[str, ...] = ()
    validation: tuple[Path, ...] = ()
    """Beside test files: what is used for testing where those have no labels."""


def split_files(folder: Path) -> Files:
    """The train and test files of a folder, or of its folder `data`, as repositories of the hub have one.

    Names are compared without regard to case; `train-00000-of-00002.parquet` is the first of two parts. Where there is
    no test file, one for validation is used for testing.

    Raises:
        DataError: one of the splits is missing, or a part of it.
    """
    place = folder if _in_folder(folder) or not (folder / "data").is_dir() else folder / "data"
    found = _in_folder(place)
    test = next((split for split in ("test", *VALIDATION) if split in found), None)
    if test is None and "train" in found and _part_of(found["train"][0]):
        return Files(found["train"], ())
    missing = [split for split, there in {"train": "train" in found, "test": test}.items() if not there]
    if missing or test is None:
        have = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise DataError(
            f"folder {folder} has no {' and no '.join(f'{split}.*' for split in missing)} file (it holds: {have}); "
            f"expected train and test with one of the endings {', '.join(SUFFIXES)}, or what the `datasets` library's "
            "save_to_disk writes. To have a test split drawn, give the path of one file instead of the folder"
        )
    notes = () if test == "test" else (f"there is no test split: {test} is used for testing",)
    other = next((found[split] for split in VALIDATION if split in found and split != test), ())
    return Files(found["train"], found[test], notes, other)


def saved_by_datasets(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the `datasets` library writes."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _known(name: str, entry: Entry) -> KnownSet:
    local = _entry_folder(entry)
    if entry.packaged:
        return KnownSet(name, entry.summary, "packaged", True)
    if local or entry.hub is None:
        return KnownSet(name, entry.summary, "data-dir", local is not None)
    hub = f"{entry.hub} ({entry.subset})" if entry.subset else entry.hub
    return KnownSet(name, entry.summary, hub, _in_hub_cache(entry.hub))


def _named(name: str) -> Source | None:
    entry = CATALOGUE.get(name)
    if entry is None:
        return None
    if entry.packaged:
        return Source(name, "packaged", Path(__file__).parents[1] / "assets" / name, columns=entry.columns)
    folder = _entry_folder(entry)
    if folder:
        return Source(name, "folder", folder, columns=entry.columns)
    if entry.hub:
        return Source(name, "hub", hub=entry.hub, subset=entry.subset, columns=entry.hub_columns)
    where = home.data_dir()
    raise DataError(
        f"data.name={name!r} is read from a folder {entry.folder!r} in $FEDLORA_DATA_DIR, which is "
        f"{f'{where} and has none' if where else 'not set'}; put its train.parquet and test.parquet there, "
        "or choose another set (`fedlora datasets`)"
    )


def _local(name: str) -> Source | None:
    candidates = [root / name] if (root := home.data_dir()) and name not in ("", ".", "..") else []
    for path in [*candidates, Path(name).expanduser()]:
        if name and path.is_dir():
            if not saved_by_datasets(path):
                split_files(path)
            return Source(path.absolute().name, "folder", path.absolute())
        if name and path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise DataError(
                    f"file {path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}"
                    f"{_CONVERSIONS.get(path.suffix.lower(), '')}"
                )
            return Source(path.stem, "file", path.absolute())
    return None


def _on_hub(config: DataConfig) -> Source | None:
    hub = HUB_ALIASES.get(config.name, config.name)
    if Path(hub).suffix.lower() in SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", hub):
        return None
    name = f"{config.name}/{config.subset}" if config.subset else config.name
    return Source(name, "hub", hub=hub, subset=config.subset)


def _unknown(name: str) -> str:
    if Path(name).suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")):
        path = Path(name).expanduser().absolute()
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"data.name={name!r}: there is no file or folder {path}.{did_you_mean(path.name, beside)}"
    names = [each.name for each in known()]
    return (
        f"data.name={name!r} is not a known set, nor a folder in $FEDLORA_DATA_DIR, nor a file."
        f"{did_you_mean(name, [*names, *HUB_ALIASES])} Known: {', '.join(names)}. "
        "For a set on the Hugging Face hub write owner/name"
    )


def _entry_folder(entry: Entry) -> Path | None:
    root = home.data_dir()
    if root and entry.folder and (root / entry.folder).is_dir():
        return root / entry.folder
    return None


def _data_folders() -> list[Path]:
    root = home.data_dir()
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root and root.is_dir() else []
    return [folder for folder in folders if _is_data(folder)]


def _is_data(folder: Path) -> bool:
    try:
        return saved_by_datasets(folder) or bool(split_files(folder))
    except DataError:
        return False


def _in_folder(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Split → its file, or its parts in order; of several kinds of files the first in the order of `SUFFIXES`.

    Raises:
        DataError: not all parts are there.
    """
    kinds: dict[tuple[str, str], dict[int, Path]] = {}
    parts: dict[tuple[str, str], int] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _SPLIT_FILE.fullmatch(path.name.lower())
        if match and path.is_file():
            kind = match["split"], match["suffix"]
            kinds.setdefault(kind, {})[int(match["part"] or 0)] = path
            parts[kind] = max(parts.get(kind, 1), int(match["parts"] or 1))
    found: dict[str, tuple[Path, ...]] = {}
    for split, suffix in sorted(kinds, key=lambda kind: SUFFIXES.index(kind[1])):
        files = kinds[split, suffix]
        if len(files) < parts[split, suffix]:
            raise DataError(
                f"folder {folder} has {len(files)} of the {parts[split, suffix]} parts of its {split} split "
                f"({', '.join(path.name for path in files.values())}); fetch the others too"
            )
        found.setdefault(split, tuple(files[part] for part in sorted(files)))
    return found


_SPLIT_FILE = re.compile(
    rf"(?P<split>train|test|{'|'.join(VALIDATION)})(?:-(?P<part>\d{{5}})-of-(?P<parts>\d{{5}}))?"
    rf"(?P<suffix>{'|'.join(map(re.escape, SUFFIXES))})"
)


def _part_of(path: Path) -> bool:
    """Whether a file is a numbered part of a split, as files of the hub are (also where it is the only one)."""
    match = _SPLIT_FILE.fullmatch(path.name.lower())
    return match is not None and match["part"] is not None


_CONVERSIONS = {
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst"), "; unpack it"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "; save it as csv in the spreadsheet"),
    ".feather": "; convert it: pandas.read_feather(file).to_parquet('data.parquet')",
    ".arrow": "; give the folder that save_to_disk wrote, not a file of it",
}
"""What makes a file of another kind readable."""


def _in_hub_cache(hub: str) -> bool:
    """Whether `datasets` has a prepared copy; its own way to tell costs an import of seconds."""
    root = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(root) / "datasets")
    return (cache.expanduser() / hub.replace("/", "___")).is_dir()
