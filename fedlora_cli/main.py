"""Console entry point.

In a checkout `flows` is importable as it is. A wheel keeps the generically named packages (`flows`, `tasks`, …) inside
`fedlora_pipeline/`, out of everybody's way, and this puts them on the path of the one process that is ours.
"""

import gc
import sys
from pathlib import Path

_GC_THRESHOLD = 50_000
"""New objects between two collections (700 by default): most of a command's first seconds are imports, and they make
nothing but what stays."""


def main() -> None:
    """Run the command line."""
    pipeline = Path(__file__).resolve().parents[1] / "fedlora_pipeline"
    if pipeline.is_dir():
        sys.path.insert(0, str(pipeline))
    gc.set_threshold(_GC_THRESHOLD)
    from fedlora_cli.app import main as command_line

    try:
        command_line()
    finally:
        gc.freeze()  # otherwise the interpreter looks through all that was imported once more, for a second
