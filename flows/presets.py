"""Where presets and sweeps that come with fedlora are."""

from __future__ import annotations

from pathlib import Path

_DEPLOYMENTS = Path(__file__).resolve().parent.parent / "deployments"

PRESETS = _DEPLOYMENTS / "presets"
SWEEPS = _DEPLOYMENTS / "sweeps"
