"""Builds the packaged data sets from WordNet 3.0: noun glosses by lexicographer file, and what nouns mean.

    python -m fedlora.data.wordnet --source /usr/share/wordnet/data.noun --out fedlora/assets/wordnet-nouns
    python -m fedlora.data.wordnet --terms --out fedlora/assets/wordnet-definitions

The order of everything comes from hashes of the texts, so the same source gives the same rows on any machine, whatever
the versions of the random number generators are.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedlora.data.apportion import largest_remainder
from fedlora.errors import DataError

TRAIN_SIZE, TEST_SIZE = 8_000, 2_000
CLASSES = 20
LARGEST_SHARE = 0.09
SMALLEST_KIND = 100
"""Terms of a kind that becomes a natural client of the definitions."""
TEST_SHARE = 0.2
PROMPT = "Define the noun: {term}"

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

TERMS_README = """# What nouns mean

{train:,} training and {test:,} test examples of instruction data: `prompt` ("Define the noun: dog"), `response` (its
definition), and `kind`, one of {classes} lexicographer files of WordNet, which are the natural clients.

Origin: WordNet 3.0, Princeton University, as Debian's `wordnet-base` packages it; licence in `LICENSE`. Changes: nouns
in lower case that occur in WordNet's tagged texts, each with its most frequent sense; the gloss up to its first
semicolon, without leading remarks in parentheses and without quoted examples; one noun for a definition; no slurs and
obscenities; kinds of fewer than {least} nouns are left out. A fifth of each kind is the test split. Built by

    python -m fedlora.data.wordnet --terms --out fedlora/assets/wordnet-definitions

| kind | train | test |
|---|---|---|
{table}
"""

_OFFENSIVE = re.compile(r"\b(slurs?|offensive|obscene|vulgar|disparag\w*|derogatory|racist)\b", re.IGNORECASE)


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


def terms(nouns: Iterable[str], index: Iterable[str]) -> list[tuple[str, str, str]]:
    """(term, definition, kind) of every noun that texts use, in its most frequent sense, in an order drawn by hash.

    Args:
        nouns: lines of `data.noun`.
        index: lines of `index.noun`, which has the senses of a noun in order, and how many of them were met in texts.
    """
    usual = dict(filter(None, map(_usual_sense, index)))
    found: dict[str, tuple[str, str, str]] = {}
    for line in nouns:
        understood = parse(line)
        if understood is None or _OFFENSIVE.search(line):
            continue
        offset, _, _, count, *words = line.split()
        said = [word for word in words[: 2 * int(count, 16) : 2] if word.islower() and usual.get(word) == offset]
        if said:
            found.setdefault(understood[0], (said[0].replace("_", " "), *understood))
    return sorted(found.values(), key=lambda row: _hash(row[0]))


def _usual_sense(line: str) -> tuple[str, str] | None:
    """A noun and where its most frequent sense stands; None where no text had it (`man wndb`)."""
    fields = line.split()
    if line.startswith(" ") or len(fields) < 7:
        return None
    tagged, first = fields[5 + int(fields[3]) : 7 + int(fields[3])]
    return (fields[0], first) if int(tagged) else None


def explained(found: list[tuple[str, str, str]]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The (prompt, response, kind) rows of the training and of the test split: of each kind its share.

    Raises:
        DataError: no kind has enough terms.
    """
    sizes = Counter(kind for _, _, kind in found)
    kept = [row for row in found if sizes[row[2]] >= SMALLEST_KIND]
    if not kept:
        raise DataError(f"no kind has {SMALLEST_KIND} nouns of texts; are these WordNet's data.noun and index.noun?")
    seen: Counter[str] = Counter()
    train: list[tuple[str, ...]] = []
    test: list[tuple[str, ...]] = []
    for term, definition, kind in kept:
        seen[kind] += 1
        part = test if seen[kind] <= TEST_SHARE * sizes[kind] else train
        part.append((PROMPT.format(term=term), definition, kind))
    return train, test


def build(source: Path, out: Path) -> None:
    """Write train.parquet, test.parquet, LICENSE and README.md to `out`, from the `data.noun` at `source`.

    Raises:
        DataError: `source` cannot be read, or is not a full `data.noun`.
    """
    lines = _lines(source)
    train, test = select(definitions(lines))
    _write(out, ("text", "label"), train, test)
    _describe(out, lines, README, train, test, cap=LARGEST_SHARE)


def build_terms(source: Path, out: Path) -> None:
    """The same for the definitions of terms, from the `data.noun` at `source` and the `index.noun` beside it.

    Raises:
        DataError: one of them cannot be read, or is not WordNet's.
    """
    lines = _lines(source)
    train, test = explained(terms(lines, _lines(source.with_name("index.noun"))))
    _write(out, ("prompt", "response", "kind"), train, test)
    _describe(out, lines, TERMS_README, train, test, least=SMALLEST_KIND)


def _lines(source: Path) -> list[str]:
    try:
        return source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source}: {error}. On Debian: apt install wordnet-base.") from error


def _describe(
    out: Path, source: list[str], text: str, train: Sequence[tuple[str, ...]], test: Sequence[tuple[str, ...]],
    **numbers: float,
) -> None:  # fmt: skip
    """LICENSE, from the head of the source, and README.md, with the counts by the last column."""
    header = (re.sub(r"^ +\d+ ?", "", line).rstrip() for line in source if line.startswith("  "))
    (out / "LICENSE").write_text("\n".join(header) + "\n", encoding="utf-8")
    in_train, in_test = (Counter(row[-1] for row in rows) for rows in (train, test))
    table = "\n".join(f"| {kind} | {count} | {in_test[kind]} |" for kind, count in sorted(in_train.items()))
    numbers |= {"majority": max(in_test.values()) / len(test), "classes": len(in_train)}
    told = text.format(train=len(train), test=len(test), table=table, **numbers)
    (out / "README.md").write_text(told, encoding="utf-8")


def _write(
    out: Path, columns: tuple[str, ...], train: Sequence[tuple[str, ...]], test: Sequence[tuple[str, ...]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        table = pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))
        pq.write_table(table, out / f"{name}.parquet", compression="zstd", compression_level=19)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description="Build a packaged data set from WordNet.")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet/data.noun"), help="WordNet's data.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--terms", action="store_true", help="definitions of nouns; needs the index.noun beside it")
    arguments = parser.parse_args()
    (build_terms if arguments.terms else build)(arguments.source, arguments.out)


if __name__ == "__main__":
    main()
