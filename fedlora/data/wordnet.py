"""Builds the packaged data set: a slice of WordNet 3.0 noun glosses, labelled by lexicographer file.

    python -m fedlora.data.wordnet --source /usr/share/wordnet/data.noun --out fedlora/assets/wordnet-nouns

The order of everything comes from hashes of the texts, so the same source gives the same rows on any machine, whatever
the versions of the random number generators are.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from fedlora.data.apportion import largest_remainder
from fedlora.errors import DataError

TRAIN_SIZE, TEST_SIZE = 8_000, 2_000
CLASSES = 20
LARGEST_SHARE = 0.09

_FILES_IN_ORDER = (
    "tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
LEXICOGRAPHER_FILES = tuple(_FILES_IN_ORDER.split())
"""Names of the noun files, in the order of their numbers from 03 on (`man lexnames`)."""

README = """# WordNet noun glosses

{train:,} training and {test:,} test examples: the definition of a noun (`text`) and the kind of thing it names
(`label`, one of {classes} lexicographer files of WordNet; the most frequent class is {majority:.1%} of the test set).

Origin: WordNet 3.0, Princeton University, as Debian's `wordnet-base` packages it; licence in `LICENSE`. Changes: the
gloss up to its first semicolon, without leading remarks in parentheses and without quoted examples; definitions that
are shared by several classes are left out, and so are the ethnic slurs; no class exceeds {cap:.0%}. Built by

    python -m fedlora.data.wordnet --source /usr/share/wordnet/data.noun --out fedlora/assets/wordnet-nouns

| class | train | test |
|---|---|---|
{table}
"""


def parse(line: str) -> tuple[str, str] | None:
    """The (definition, class) of one line of `data.noun`; None for the licence header and for empty definitions.

    The format is that of `man wndb`: the second field is the number of the lexicographer file, the gloss follows `|`.
    """
    head, bar, gloss = line.partition("|")
    if line.startswith(" ") or not bar or "(ethnic slur)" in gloss:
        return None
    definition = re.sub(r'"[^"]*"?', "", gloss).split(";")[0].strip()
    definition = re.sub(r"^(\([^()]*\)\s*)+(?=\S)", "", definition).strip(" :,")
    label = LEXICOGRAPHER_FILES[int(head.split(maxsplit=2)[1]) - 3]
    return (definition, label) if definition else None


def definitions(lines: Iterable[str]) -> dict[str, list[str]]:
    """Class → its distinct definitions in an order drawn by hash; definitions of more than one class are left out."""
    classes: dict[str, set[str]] = defaultdict(set)
    for text, label in filter(None, map(parse, lines)):
        classes[text].add(label)
    found: dict[str, list[str]] = defaultdict(list)
    for text in sorted(classes, key=_hash):
        if len(classes[text]) == 1:
            found[next(iter(classes[text]))].append(text)
    return found


def select(
    found: dict[str, list[str]], classes: int = CLASSES, train: int = TRAIN_SIZE, test: int = TEST_SIZE
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (text, label) rows of the training and of the test split, stratified, no class above `LARGEST_SHARE`.

    Raises:
        DataError: the source holds fewer classes or fewer definitions than asked for.
    """
    largest = Counter({label: len(texts) for label, texts in found.items()}).most_common(classes)
    sizes = dict(sorted(largest))
    if len(sizes) < classes:
        raise DataError(f"the source has {len(sizes)} noun classes, expected {classes}; is it WordNet's data.noun?")
    train_counts, test_counts = capped(train, sizes), capped(test, sizes)
    train_rows, test_rows = [], []
    for label, size in sizes.items():
        cut, end = train_counts[label], train_counts[label] + test_counts[label]
        if end > size:
            raise DataError(f"class {label!r} has {size} definitions, {end} are needed; use a full data.noun")
        train_rows += [(text, label) for text in found[label][:cut]]
        test_rows += [(text, label) for text in found[label][cut:end]]
    return sorted(train_rows, key=lambda row: _hash(row[0])), sorted(test_rows, key=lambda row: _hash(row[0]))


def capped(total: int, sizes: dict[str, int]) -> dict[str, int]:
    """How many of `total` rows each class gets: its natural share, but at most `LARGEST_SHARE` (or an even share)."""
    cap = max(int(LARGEST_SHARE * total), -(-total // len(sizes)))
    fixed: dict[str, int] = {}
    while True:
        free = {label: size for label, size in sizes.items() if label not in fixed}
        if not free:
            return fixed
        counts = largest_remainder(total - sum(fixed.values()), list(free.values()))
        over = [label for label, count in zip(free, counts, strict=True) if count > cap]
        if not over:
            return fixed | dict(zip(free, map(int, counts), strict=True))
        fixed |= dict.fromkeys(over, cap)


def build(source: Path, out: Path) -> None:
    """Write train.parquet, test.parquet, LICENSE and README.md to `out`, from the `data.noun` at `source`.

    Raises:
        DataError: `source` cannot be read, or is not a full `data.noun`.
    """
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source}: {error}. On Debian: apt install wordnet-base.") from error
    train, test = select(definitions(lines))
    out.mkdir(parents=True, exist_ok=True)
    _write(train, out / "train.parquet")
    _write(test, out / "test.parquet")
    header = (re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines if line.startswith("  "))
    (out / "LICENSE").write_text("\n".join(header) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_readme(train, test), encoding="utf-8")


def _readme(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> str:
    in_train, in_test = (Counter(label for _, label in train), Counter(label for _, label in test))
    table = "\n".join(f"| {label} | {count} | {in_test[label]} |" for label, count in sorted(in_train.items()))
    majority = max(in_test.values()) / len(test)
    return README.format(
        train=len(train), test=len(test), classes=len(in_train), majority=majority, cap=LARGEST_SHARE, table=table
    )


def _write(rows: list[tuple[str, str]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), path, compression="zstd", compression_level=19)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description="Build the packaged slice of WordNet noun glosses.")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet/data.noun"), help="WordNet's data.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    build(arguments.source, arguments.out)


if __name__ == "__main__":
    main()
