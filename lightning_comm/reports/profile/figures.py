"""The figures of a profile's page, as SVG. They need matplotlib, which the package can do without."""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from lightning_comm.core.key_figures import RunFigures, StepFigures
from lightning_comm.core.rank_profile import RankProfile, inferred_waits
from lightning_comm.core.step_timeline import aligned
from lightning_comm.reports.svg import legend, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "own": "#cfd8e3",
    "hidden": "#3f8f6b",
    "exposed": "#c8374a",
    "wait": "#eda83a",
    "lightning": "#7a5aa6",
    "other": "#8a8a8a",
}
NAMES = {
    "own": "busy by itself (compute, data, optimizer)",
    "hidden": "communication hidden behind compute",
    "exposed": "exposed transfer",
    "wait": "waiting for slower ranks",
    "lightning": "Lightning's own collectives",
    "other": "metrics' and your own collectives",
}
_MOST_LANES = 16  # ranks drawn one by one
_WINDOWS = 15  # of neighbouring steps whose mean is drawn fit into the run


def step_by_rank(run: RunFigures) -> bytes:
    """Return where the time of a mean step goes, one bar a rank."""
    ranks = [rank for rank in run.ranks if rank.steps][:_MOST_LANES]
    figure, axes = new_figure(0.9 + 0.34 * len(ranks))
    parts: dict[str, list[float]] = {
        "own": [rank.own_s for rank in ranks],
        "exposed": [max(0.0, rank.exposed_s - rank.wait_s) for rank in ranks],
        "wait": [rank.wait_s for rank in ranks],
        "lightning": [rank.lightning_s for rank in ranks],
        "other": [rank.other_s for rank in ranks],
    }
    left = [0.0] * len(ranks)
    lanes = range(len(ranks))
    for name, seconds in parts.items():
        if any(seconds):
            axes.barh(lanes, [1e3 * s for s in seconds], left=left, color=COLOURS[name], label=NAMES[name], height=0.7)
            left = [begin + 1e3 * s for begin, s in zip(left, seconds, strict=True)]
    _lanes(axes, [f"rank {rank.rank}" for rank in ranks])
    axes.set_xlabel("ms of a mean step")
    return to_svg(figure)


def timeline(ranks: Sequence[RankProfile]) -> bytes:
    """Return a few steps of all ranks on rank 0's clock."""
    waits = inferred_waits(ranks)
    shown = [
        (rank, aligned(rank.timeline, waits.get(rank.rank, {}), rank.on_rank_0)) for rank in ranks if rank.timeline
    ][:_MOST_LANES]
    begin_s = min(steps[0].start_s for _, steps in shown)
    figure, axes = new_figure(1.0 + 0.42 * len(shown))
    named: set[str] = set()
    for lane, (_, steps) in enumerate(shown):
        for step in steps:
            _bar(axes, named, "own", lane, (step.start_s - begin_s, step.end_s - begin_s))
            axes.vlines(1e3 * (step.start_s - begin_s), lane - 0.4, lane + 0.4, color="#222222", linewidth=0.8)
            for span in step.spans:
                _bar(axes, named, span.name, lane, (span.start_s - begin_s, span.end_s - begin_s))
    _lanes(axes, [f"rank {rank.rank}" for rank, _ in shown])
    first, last = shown[0][1][0].batch, shown[0][1][-1].batch
    axes.set_xlabel(f"ms, from the start of training batch {first} to the end of {last}")
    return to_svg(figure)


def _bar(axes: "Axes", named: set[str], name: str, lane: int, span: tuple[float, float]) -> None:
    height = 0.25 if name == "hidden" else 0.7  # beside it compute goes on, so that remains to be seen
    bottom = lane + 0.1 if name == "hidden" else lane - 0.35
    label = None if name in named else NAMES[name]
    named.add(name)
    pieces = [(1e3 * span[0], 1e3 * (span[1] - span[0]))]
    axes.broken_barh(pieces, (bottom, height), facecolors=COLOURS[name], label=label)


def bytes_per_step(rank: RankProfile) -> bytes:
    """Return what one rank sent in each step, and what dense fp32 would have sent."""
    figure, axes = new_figure(2.6)
    steps = rank.kept
    width = max(1, rank.stride)
    axes.bar(
        [step.batch for step in steps],
        [step.sent_bytes / 1e6 for step in steps],
        width=width,
        color="#1f6fb4",
        label="sent",
    )
    axes.axhline(
        max(step.dense_bytes for step in steps) / 1e6, color="#222222", linestyle="--", linewidth=1, label="dense fp32"
    )
    sums = rank.sums
    axes.axhline(sums.sent_bytes / sums.steps / 1e6, color="#1f6fb4", linestyle=":", linewidth=1.4, label="mean sent")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    _over_the_run(axes)
    return to_svg(figure)


def shares(ranks: Sequence[RankProfile]) -> bytes:
    """Return the shares of communication over the run, means of neighbouring steps and of the ranks."""
    figure, axes = new_figure(2.6)
    steps = [
        [step for step in rank.kept if step.timed and step.duration_s > 0 and step.batch >= rank.warmup_steps]
        for rank in ranks
    ]
    _curve(axes, steps, lambda step: step.comm_s, ("#3f8f6b", "communication under way"))
    _curve(axes, steps, lambda step: step.exposed_s, ("#c8374a", "exposed"))
    axes.set_ylabel("% of the step")
    axes.set_ylim(0, 100)
    _over_the_run(axes)
    return to_svg(figure)


def _curve(
    axes: "Axes", ranks: Sequence[list[StepFigures]], of: Callable[[StepFigures], float], style: tuple[str, str]
) -> None:
    longest = max(len(steps) for steps in ranks)
    window = max(1, longest // _WINDOWS)
    points = []
    for start in range(longest - window + 1):
        within = [step for steps in ranks for step in steps[start : start + window]]
        share = sum(map(of, within)) / sum(step.duration_s for step in within)
        points.append((mean(step.batch for step in within), 100 * share))
    axes.plot(*zip(*points, strict=True), color=style[0], label=style[1], linewidth=1.8)


def _lanes(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0)
    legend(axes)


def _over_the_run(axes: "Axes") -> None:
    axes.set_xlabel("training batch")
    axes.margins(x=0.01)
    legend(axes)
