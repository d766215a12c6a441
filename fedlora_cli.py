"""Console entry point.

In a checkout `flows` is importable as it is. A wheel keeps the generically named packages (`flows`, `tasks`, …) inside
`fedlora_pipeline/`, out of everybody's way, and this puts them on the path of the one process that is ours.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    pipeline = Path(__file__).resolve().parent / "fedlora_pipeline"
    if pipeline.is_dir():
        sys.path.insert(0, str(pipeline))
    from flows.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
