"""Draws the pictures of docs/convergence.md.

python docs/figures.py                      sp-ps.png, on two tiny clients
python docs/figures.py SWEEP_FOLDER         conditions.png, from a `fedlora sweep strategies`
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.files import home
from fedlora.report import plots
from fedlora.report.plots import colour
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance, measure_round
from fedlora.sweep.folder import SweepFolder

IMAGES = Path(__file__).parent / "images"
SLOPES = (-0.7, 1.3)
"""Two clients of rank one on a 2 × 2 layer: B = (1, x)ᵀ, A = (1, x), so B·A = [[1, x], [x, x²]]."""


SHOWN = ["fedit", "flora-na", "svd", "ffa-lora", "flora", "oracle"]


def conditions(sweep: Path) -> None:
    """R, and P + Q, against rounds for a few strategies of a finished sweep."""
    state = SweepFolder.read(sweep)
    assert state is not None, f"{sweep} holds no sweep"
    digests = {cell.settings["strategy"]: str(cell.digest) for cell in state.having("finished")}
    folders = {name: next((home.runs() / state.instance).glob(f"*-{digests[name][:8]}")) for name in SHOWN}
    runs = {name: rounds.records(RunFolder(folder)) for name, folder in folders.items()}
    plots.conditions_figure(runs, IMAGES / "conditions.png")


def two_families() -> None:
    """One picture: clients, the mean of their products, and what rank-one broadcasts come to, on real factors."""
    uploads = [Factors(torch.tensor([[1.0], [x]]), torch.tensor([[1.0, x]])) for x in SLOPES]
    updates = Updates.collect(Update(u, 1, Adapter({"m": pair})) for u, pair in enumerate(uploads))
    state = ServerState(Adapter({"m": Factors(torch.zeros(2, 1), torch.ones(1, 2))}))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    line = np.linspace(-1.1, 1.6, 200)
    axes.plot(line, line**2, color="#888888", label="products of rank one with entry (1, 1) = 1")
    ends = np.array([[x, x * x] for x in SLOPES])
    axes.plot(ends[:, 0], ends[:, 1], ":", color="#888888")
    axes.scatter(ends[:, 0], ends[:, 1], color="black", zorder=3, label="clients' products $B_uA_u$")
    ideal = ends.mean(axis=0)
    axes.scatter(*ideal, marker="*", s=160, color="black", zorder=3, label="mean of products $W^*/s$ (rank two)")
    for name, words in (
        ("fedit", "PS: product of means"),
        ("svd", "SP: nearest of rank one"),
        ("oracle", "the rest into the base"),
    ):
        strategy = registry.make(name)
        new = advance(strategy, state, updates)
        held = new.adapter.factors["m"].product().double()
        if new.base_step:
            held = held + new.base_step.modules["m"].product().double()
        rho = measure_round(strategy, new, updates).rho
        ring = {"s": 300, "facecolors": "none", "edgecolors": colour(name)} if rho < 0.01 else {"color": colour(name)}
        axes.scatter(held[0, 1], held[1, 1], zorder=4, label=f"{name} ({words}), ρ = {rho:.2f}", **ring)
        axes.plot([ideal[0], held[0, 1]], [ideal[1], held[1, 1]], color=colour(name), linewidth=1)
    axes.set(xlabel="entry (1, 2) of the product", ylabel="entry (2, 2) of the product")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(IMAGES / "sp-ps.png", dpi=130)


if __name__ == "__main__":
    conditions(Path(sys.argv[1])) if len(sys.argv) > 1 else two_families()
