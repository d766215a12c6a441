"""The readers of settings: YAML files of runs and of sweeps, and the words of a command line."""

import pytest
from hypothesis import strategies as st

from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.sweep import plan as sweeps
from tests.fuzz import campaign, settings

pytestmark = pytest.mark.timeout(0)  # its timer is the one that watches a case
SHARE = 0.175


def test_files_of_runs_are_read_or_refused(shard, place):
    path = place / "run.yaml"

    def check(case):
        content, words = case
        path.write_bytes(settings.made(content))
        config = campaign.outcome(lambda: configfile.load(path, configfile.parse_overrides(words)))
        if config is not None:
            check_written(config, path)

    words = st.just([]) | settings.WORDS
    campaign.run(shard, st.tuples(settings.files(settings.RUNS, settings.RUN_CHANGES), words), check)


def check_written(config, path):
    """A run writes its configuration down and is continued from there."""
    config.digest()
    path.write_text(configfile.to_yaml(config), encoding="utf-8")
    again = configfile.load(path)
    assert again.digest() == config.digest()


def test_files_of_sweeps_are_read_or_refused(shard, place):
    path = place / "sweep.yaml"

    def check(case):
        content, words = case
        path.write_bytes(settings.made(content))
        found = campaign.outcome(lambda: sweeps.load(str(path), configfile.parse_overrides(words), PRESETS, SWEEPS))
        for cell in found.cells if found else ():
            assert cell.name
            assert cell.digest

    words = st.just([]) | st.just([]) | settings.WORDS
    campaign.run(shard, st.tuples(settings.files(settings.SWEEPS, settings.SWEEP_CHANGES), words), check)
