"""What may come of a case, and many cases in a row."""

import shutil
import signal
from contextlib import contextmanager

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from fedlora.errors import FedloraError

SECONDS = 5
"""A case of a few kilobytes that takes longer is a bug."""


class TooSlow(BaseException):
    """Not an Exception, so that nothing takes it for a damaged file."""


@contextmanager
def watched():
    def stop(*_):
        raise TooSlow(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call):
    """What a call returns, or None where it refuses in one line; anything else is a bug and goes on."""
    try:
        with watched():
            return call()
    except FedloraError as error:
        check_line(str(error))
        return None


def check_line(text):
    assert text.strip(), "an error without words"
    assert len(text) < 1000, f"an error of {len(text)} characters: {text[:300]}"
    assert text.isprintable(), f"an error that cannot be printed: {text!r}"


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def empty(folder):
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run(shard, cases, check):
    """Give `check` so many cases; with a seed others each time, without it always the same."""
    count, seed = shard
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    quiet = settings(
        max_examples=count,
        deadline=None,
        derandomize=seed is None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    wanted = quiet(given(case=cases)(lambda case: check(case)))  # noqa: PLW0108 (Hypothesis goes by the name)
    (wanted if seed is None else hypothesis.seed(seed)(wanted))()
