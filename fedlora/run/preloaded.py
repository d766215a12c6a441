"""What the fork server imports before it forks workers (see `fedlora.training.forerunner`); imported by nothing else.

While the imports go on, they are given up when the process for which they are made ends: a command that refuses its
configuration leaves nothing behind.
"""

import gc
import os
import threading

_parent = os.getppid()
_ready = threading.Event()


def _end_with_parent() -> None:
    while not _ready.wait(0.1):
        if os.getppid() != _parent:
            os._exit(0)


_watch = threading.Thread(target=_end_with_parent, daemon=True)
_watch.start()
gc.disable()  # imports make nothing but what stays

import fedlora.run.jobs  # noqa: E402, F401

# isort: split
from fedlora.model import peftlibrary  # noqa: E402

peftlibrary.load()
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402, F401

gc.freeze()  # a collection in a worker would write to, and so copy, what it shares with the others
gc.enable()
_ready.set()
_watch.join()  # a process that forks should have one thread
