"""fedlora's library alone, without Prefect and MLflow: `fedlora.run.loop`.

python -m peers.with_loop RUN KEY=VALUE ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.run import loop

if __name__ == "__main__":
    path, *settings = sys.argv[1:]
    loop.train(configfile.load("demo", configfile.parse_overrides(settings), PRESETS), Path(path))
