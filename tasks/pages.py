"""What a run shows on its Prefect page: a progress bar, and a summary with a link to its MLflow page."""

from __future__ import annotations

from typing import cast
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from fedlora import metrics
from fedlora.config import RunConfig
from fedlora.errors import counted
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder
from mlflow_tracking import store
from mlflow_tracking.tracker import Tracked
from tasks import outages, where

_PATIENCE_S = 300.0
"""How long the summary waits for a server that is away."""

_TABLE = (
    ("ρ", metrics.RHO_MODEL),
    ("ρ floor", metrics.RHO_FLOOR),
    ("effective clients", metrics.RHO_EFFECTIVE_CLIENTS),
)


class RunPage:
    """The artifacts of one flow run."""

    def __init__(self, config: RunConfig, tracked: Tracked, folder: RunFolder) -> None:
        self._config, self._tracked, self._folder = config, tracked, folder
        created = create_progress_artifact(0.0, key="federated-progress", description=f"{config.strategy}: rounds done")
        self._progress = cast(UUID, created)  # a coroutine only where called from async code

    def update(self, number: int) -> None:
        """Round `number` is complete."""
        done = 100.0 * number / self._config.rounds
        outages.optional(lambda: update_progress_artifact(self._progress, done))

    def note(self) -> str:
        """The run in Markdown: what it was and a row per round."""
        config = self._config
        partition = self._folder.need_json("partition.json")
        return "\n".join(
            [
                f"## {config.strategy} on {config.data.name}",
                f"{config.model.name}, {counted(config.clients, 'client')} ({config.clients_per_round} a round), "
                f"partition `{config.partition.name}` (hash `{partition['hash']}`), "
                f"rank {config.lora.rank}, seed {config.seed}",
                "",
                *rounds_table(self._folder),
            ]
        )

    def summarise(self, note: str) -> None:
        """Publish the summary artifact: the note, and the way to MLflow."""
        text, about = f"{note}\n\n{self._way_to_mlflow()}", self._config.strategy
        outages.optional(
            lambda: create_markdown_artifact(text, key="federated-summary", description=about), _PATIENCE_S
        )

    @property
    def address(self) -> str:
        """Of its page in MLflow."""
        tracked = self._tracked
        return where.mlflow_page(tracked.uri, store.run_page(tracked.experiment, tracked.run))

    def _way_to_mlflow(self) -> str:
        return f"[MLflow run]({self.address}), run folder `{self._folder.path}`"


def rounds_table(folder: RunFolder) -> list[str]:
    """A Markdown table with a row per finished round."""
    table = [(score.title, f"global/{score.name}") for score in folder.objective.scores_of(folder.config)]
    table += [(f"local {folder.score.title}", f"local/{folder.score.name}"), *_TABLE]
    lines = [f"| round | {' | '.join(title for title, _ in table)} | MB sent |", "|---" * (len(table) + 2) + "|"]
    for record in rounds.records(folder):
        cells = (f"{record.metrics[name]:.4f}" if name in record.metrics else "–" for _, name in table)
        lines.append(f"| {record.round} | {' | '.join(cells)} | {record.metrics[metrics.BYTES_TOTAL] / 1e6:.2f} |")
    return lines
