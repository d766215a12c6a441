"""Examples of made-up tokens, which the small models of the tests know."""

import numpy as np

from fedlora.data.tokens import Examples


def made(count: int, seed: int = 0) -> Examples:
    """Examples of 3 to 9 tokens; the label is told by the second token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 10, count)
    labels = rng.integers(0, 3, count)
    ids = [rng.integers(20, 99, length).astype(np.int32) for length in lengths]
    for row, label in zip(ids, labels, strict=True):
        row[1] = 5 + label
    return Examples(ids, None, labels.astype(np.int64), lengths.astype(np.int64))
