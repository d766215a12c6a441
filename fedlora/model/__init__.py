"""The frozen base in memory, and attaching and swapping adapters."""

import logging

from fedlora.model.base import load_base
from fedlora.model.known import KNOWN, resolve

__all__ = ["KNOWN", "load_base", "resolve"]

# PEFT imports bitsandbytes where it is installed, also for models that are not quantised; on processors with bf16 it
# then warns that a faster product in 4 bits, of a package of its own, is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
