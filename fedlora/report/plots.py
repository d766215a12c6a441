"""Pictures of runs over rounds (matplotlib, drawn without a display)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora import metrics
from fedlora.metrics import RoundRecord
from fedlora.report import wording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedlora.objective import Score

_COLOURS = {
    "fedit": "#4c78a8",
    "ffa-lora": "#b279a2",
    "fedsa-lora": "#d67195",
    "rolora": "#8c6bb1",
    "flora": "#f58518",
    "fedex-lora": "#ffbf79",
    "flexlora": "#88d27a",
    "svd": "#54a24b",
    "flora-na": "#e45756",
    "lora-fair": "#ff9d98",
    "zero-padding": "#9ecae9",
    "hetlora": "#439894",
    "replication": "#1f77b4",
    "fedsvd": "#5e4fa2",
    "raflora": "#2f6b2f",
    "fedrot-lora": "#17becf",
    "fedmomentum": "#b79a20",
    "florist": "#e3772b",
    "fed-sb": "#9d755d",
    "ravan": "#d8b5a5",
    "oracle": "#222222",
    "local": "#79706e",
    "centralised": "#bab0ac",
}
_SPARE = ("#f58518", "#72b7b2", "#eeca3b", "#9d755d", "#ff9da6", "#1f77b4", "#17becf", "#bcbd22")


_NOTHING = 1e-12
"""Share of the largest value below which a sum of squares is rounding: clients that keep what they have do not jump."""


def colour(strategy: str) -> str:
    """The colour of a strategy, everywhere the same."""
    return _COLOURS.get(strategy) or _SPARE[sum(strategy.encode()) % len(_SPARE)]


def rounds_figure(
    runs: Mapping[str, Sequence[RoundRecord]],
    path: Path,
    score: Score,
    colours: Mapping[str, str] | None = None,
    title: str = "",
    legend: Mapping[str, str] | None = None,
) -> None:
    """Global score and divergence against rounds, one line per run (key: its label).

    Args:
        runs: the rounds' records of each run.
        path: the PNG to write.
        score: the one that decides.
        colours: by label; the strategy's colour where the label is a strategy.
        title: above both panels.
        legend: by label, the words shown for it; runs with the same words (seeds of one setting) share an entry.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, records in runs.items():
        shade = (colours or {}).get(label) or colour(label)
        _line(left, records, f"{metrics.GLOBAL}{score.name}", (legend or {}).get(label, label), shade)
        _line(right, records, metrics.RHO_MODEL, label, shade)
        _line(right, records, metrics.RHO_FLOOR, None, shade, ":")
    left.set(xlabel="round", ylabel=f"global test {score.title}", title=wording.title(score))
    if (score.low, score.high) == (0, 1):
        left.set_ylim(0, 1)
    right.set(
        xlabel="round", ylabel="ρ  (relative error of the aggregate)", title="Divergence; dotted: floor of rank r"
    )
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, left)
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def conditions_figure(
    runs: Mapping[str, Sequence[RoundRecord]],
    path: Path,
    colours: Mapping[str, str] | None = None,
    legend: Mapping[str, str] | None = None,
) -> None:
    """The observable sides of the two convergence conditions of arXiv 2508.01348 against rounds, one line per run.

    Left R (weak: local models), right P + Q (strong: the global model); dashed their means over the rounds so far, the
    quantities through which they enter the paper's bounds. Logarithmic, in squared units of B·A and of the factors.
    Where nothing jumps (clients keep what they have) nothing is drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, names in zip(panels, ((metrics.ABO_R,), (metrics.ABO_P, metrics.ABO_Q)), strict=True):
        curves = {
            label: [sum(record.metrics[name] for name in names) for record in records[1:]]
            for label, records in runs.items()
        }
        visible = _NOTHING * max((value for curve in curves.values() for value in curve), default=0.0)
        for label, curve in curves.items():
            if max(curve, default=0.0) > visible:
                shade = (colours or {}).get(label) or colour(label)
                _condition(axes, curve, (legend or {}).get(label, label), shade)
    panels[0].set(ylabel="R  (squared, products B·A)", title="Weak condition: how far products jump")
    panels[1].set(ylabel="P + Q  (squared, factors)", title="Strong condition: how far factors jump")
    for axes in panels:
        axes.set(xlabel="round", yscale="log")
        _widen(axes)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels[0], "solid: round\ndashed: mean so far", most_inside=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _legend(figure: Figure, axes: Axes, title: str | None = None, most_inside: int = 8) -> None:
    """Within the panel up to so many entries, else beside both."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= most_inside:
        axes.legend(frameon=False, title=title, fontsize="small", title_fontsize="small")
        return
    figure.set_size_inches(12, 4.5)
    figure.legend(
        handles, labels, loc="outside right upper", frameon=False, title=title, fontsize="small", title_fontsize="small"
    )


def _widen(axes: Axes) -> None:
    """Show at least a factor of ten, with plain numbers: small changes should look small."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _condition(axes: Axes, values: Sequence[float], label: str, shade: str) -> None:
    numbers = range(1, len(values) + 1)
    means = [sum(values[: count + 1]) / (count + 1) for count in range(len(values))]
    shown = axes.get_legend_handles_labels()[1]
    axes.plot(numbers, values, color=shade, label=None if label in shown else label, marker="o", markersize=3)
    axes.plot(numbers, means, "--", color=shade, linewidth=1)


def _line(
    axes: Axes, records: Sequence[RoundRecord], name: str, label: str | None, shade: str, style: str = "-"
) -> None:
    points = [(record.round, record.metrics[name]) for record in records if name in record.metrics]
    if points:
        xs, ys = zip(*points, strict=True)
        shown = axes.get_legend_handles_labels()[1]
        label = None if label in shown else label
        axes.plot(xs, ys, style, color=shade, label=label, marker="o" if style == "-" else None, markersize=3)
