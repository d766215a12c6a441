"""Where presets and sweeps that come with fedlora are."""

from __future__ import annotations

from pathlib import Path

DEPLOYMENTS = Path(__file__).resolve().parent

PRESETS = DEPLOYMENTS / "presets"
SWEEPS = DEPLOYMENTS / "sweeps"
