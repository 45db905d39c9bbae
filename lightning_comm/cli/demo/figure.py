"""The demo's figure: the period along the learning rate, and accuracy against bytes."""

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lightning_comm.cli.demo.report import NAMES, by_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"ddp": "#555555", "local_sgd": "#d9822b", "qsr": "#1f6fb4"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the figure and save it as PNG."""
    # Imported here: the package works without matplotlib. `Figure` itself, since pyplot looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25))
    top = figure.add_subplot(grid[0, 0])
    _draw_lr(top, results)
    _draw_periods(figure.add_subplot(grid[1, 0], sharex=top), results)
    _draw_accuracy(figure.add_subplot(grid[:, 1]), results)
    figure.savefig(path)


def _draw_lr(axes: "Axes", results: dict[str, Any]) -> None:
    axes.plot(results["runs"][0]["lrs"], color="#222222")
    axes.set_ylabel("learning rate")
    axes.set_title("As the learning rate falls ...", loc="left", fontsize=11)
    axes.tick_params(labelbottom=False)
    _tidy(axes)


def _draw_periods(axes: "Axes", results: dict[str, Any]) -> None:
    for method, runs in by_method(results).items():
        rounds = runs[0]["rounds"] or [{"end_step": runs[0]["steps"], "period_steps": 1}]  # DDP: every step
        lengths = [round_["period_steps"] for round_ in rounds]
        edges = [rounds[0]["end_step"] - lengths[0], *(round_["end_step"] for round_ in rounds)]
        if method == "ddp":
            edges[0] = 0
        axes.stairs(lengths, edges, baseline=None, color=_COLOURS[method], label=NAMES[method], linewidth=1.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel("period H (steps)")
    axes.set_xlabel("optimizer step")
    axes.set_title("... QSR's rounds grow", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _draw_accuracy(axes: "Axes", results: dict[str, Any]) -> None:
    grouped = by_method(results)
    for method, runs in grouped.items():
        curves = [run["curve"] for run in runs]
        megabytes = [
            mean(point["training_wire_bytes"] for point in points) / 1e6 for points in zip(*curves, strict=True)
        ]
        accuracies = [[100 * point["accuracy"] for point in points] for points in zip(*curves, strict=True)]
        means = [mean(points) for points in accuracies]
        label = f"{NAMES[method]}: {means[-1]:.1f} % for {megabytes[-1]:,.0f} MB"
        axes.plot(megabytes, means, color=_COLOURS[method], marker="o", markersize=3.5, label=label)
        if len(runs) > 1:
            low, high = [min(points) for points in accuracies], [max(points) for points in accuracies]
            axes.fill_between(megabytes, low, high, color=_COLOURS[method], alpha=0.15, linewidth=0)
    seeds = len(grouped["ddp"])
    band = f", mean of {seeds} seeds and their range" if seeds > 1 else ""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("sent per rank in training so far (MB)")
    axes.set_ylabel("accuracy on held-out digits (%)")
    axes.set_title(f"What accuracy costs in bytes{band}", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="lower right", title="at the end of the run")
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
