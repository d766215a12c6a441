"""Groups that no column names: texts that are alike, or responses of like length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedlora import seeds
from fedlora.errors import DataError, counted

_ASKED = re.compile(r"(clusters|lengths):(\d+)")
_WORDS = 20_000
"""Words that are counted: the most frequent ones."""

Codes = npt.NDArray[np.int64]


class Asked(NamedTuple):
    """What `partition.by` asks for instead of a column."""

    kind: str
    """`clusters` of texts, or `lengths` of responses."""
    groups: int


class Groups(NamedTuple):
    """Names of the groups, and the group of every training and every test example (indices into the names)."""

    names: tuple[str, ...]
    train: Codes
    test: Codes


def asked(by: str | None) -> Asked | None:
    """`clusters:8` or `lengths:4`, read; None where `partition.by` names a column, or nothing."""
    found = _ASKED.fullmatch(by or "")
    return Asked(found.group(1), int(found.group(2))) if found else None


def clusters(groups: int, train: Sequence[str], test: Sequence[str], seed: int) -> Groups:
    """Texts by k-means of their TF-IDF vectors (scikit-learn), fitted to the training texts; named after the two words
    that weigh most in each. The same seed gives the same clusters on one machine.

    Raises:
        DataError: fewer than two groups, or more than there are texts, or texts without words.
    """
    from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    _check(f"clusters:{groups}", groups, len(train))
    try:
        words = TfidfVectorizer(max_features=_WORDS, sublinear_tf=True, stop_words="english")
        vectors = words.fit_transform(train)
    except ValueError as error:
        raise DataError(f"partition.by=clusters:{groups}: the texts cannot be told apart by words ({error})") from None
    draw = seeds.key(seed, "clusters") % 2**32
    means = MiniBatchKMeans(groups, random_state=draw, n_init=3, batch_size=1024).fit(vectors)
    terms = words.get_feature_names_out()
    heaviest = [[str(terms[i]) for i in np.argsort(-centre)[:2]] for centre in means.cluster_centers_]
    names = tuple(f"{number} {', '.join(each)}" for number, each in enumerate(heaviest, start=1))
    found = (means.predict(each).astype(np.int64) for each in (vectors, words.transform(test)))
    return Groups(names, *found)


def lengths(groups: int, train: Sequence[str], test: Sequence[str]) -> Groups:
    """Responses by their length in characters: groups of like size among the training examples.

    Raises:
        DataError: fewer than two groups, more than there are responses, or all are of one length.
    """
    _check(f"lengths:{groups}", groups, len(train))
    measured = [np.array([len(text) for text in texts], dtype=np.int64) for texts in (train, test)]
    edges = np.unique(np.quantile(measured[0], np.arange(1, groups) / groups, method="lower"))
    edges = edges[edges < measured[0].max()]
    if not len(edges):
        raise DataError(f"partition.by=lengths:{groups}: all responses are of one length; leave it out")
    names = [f"up to {edge} characters" for edge in edges] + [f"above {edges[-1]} characters"]
    return Groups(tuple(names), *(np.searchsorted(edges, each, side="left") for each in measured))


def _check(by: str, groups: int, texts: int) -> None:
    if not 2 <= groups <= texts:
        raise DataError(f"partition.by={by} on {counted(texts, 'training example')}; expected 2 to {texts} groups")
