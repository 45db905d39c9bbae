"""The figures of a partitioned run's page, as SVG. They need matplotlib, which the package can do without."""

import math
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from lightning_comm.formats.adaptive_partition import PartitionJournal, Window
from lightning_comm.reports.svg import legend, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8  # ranks with a line and a colour each; of more, a map and bands are drawn
_COLOURS = ("#1f6fb4", "#eda83a", "#3f8f6b", "#c8374a", "#7a5aa6", "#2aa3b8", "#9a6b3f", "#8a8a8a")
_MOST_POINTS = 300  # of neighbouring windows the median is drawn
_MOST_MARKS = 40  # changes with a line each
_ByRank = Callable[[Window], Sequence[float | None]]


def shares(journal: PartitionJournal) -> bytes:
    """Return the share of the batch by rank over the run."""
    edges = [float(_at(journal, change.epoch, change.batch)) for change in journal.changes]
    edges.append(max(_end(journal), edges[-1] + 1))
    sizes = [change.sizes for change in journal.changes]
    if journal.ranks > MOST_LINES:
        return _share_map(journal, edges, sizes)
    figure, axes = new_figure(2.6)
    percents = [[100 * n / journal.global_batch_size for n in each] for each in [*sizes, sizes[-1]]]
    by_rank = list(zip(*percents, strict=True))
    axes.stackplot(
        edges,
        *by_rank,
        step="post",
        colors=_COLOURS,
        labels=[f"rank {rank}" for rank in range(journal.ranks)],
        edgecolor="white",
        linewidth=0.8,
    )
    axes.set_ylabel("% of the batch")
    axes.set_ylim(0, 100)
    _over_the_run(axes, journal, (0, edges[-1]))
    legend(axes, MOST_LINES)
    return to_svg(figure)


def _share_map(journal: PartitionJournal, edges: Sequence[float], sizes: Sequence[Sequence[int]]) -> bytes:
    from matplotlib.colors import TwoSlopeNorm

    even = journal.global_batch_size / journal.ranks
    cells = [[each[rank] / even for each in sizes] for rank in range(journal.ranks)]
    most = max(2.0, *map(max, cells))
    figure, axes = new_figure(3.4)
    colours = TwoSlopeNorm(1.0, 0.0, most)
    drawn = axes.pcolormesh(edges, _lanes(journal), cells, cmap="RdBu", norm=colours, rasterized=True)
    bar = figure.colorbar(drawn, ax=axes, label="of an even share", pad=0.01)
    bar.set_ticks([0.0, 0.5, 1.0, (1 + most) / 2, most])
    axes.set_ylabel("rank")
    axes.invert_yaxis()
    _over_the_run(axes, journal, (0, edges[-1]))
    return to_svg(figure)


def busy_and_waiting(journal: PartitionJournal) -> bytes:
    """Return how long ranks were busy and how long they waited, over the run.

    Raises:
        ValueError: If the journal has no window, so that nothing is known of times.

    """
    groups = _groups("busy_and_waiting", journal.windows)
    figure, (above, below) = _two_panels(4.6)
    span = (_begin(journal), _end(journal))
    if journal.ranks <= MOST_LINES:
        for rank, (busy, wait) in enumerate(zip(_lines(groups, _busy), _lines(groups, _wait), strict=True)):
            _line(above, journal, groups, busy, _COLOURS[rank], f"rank {rank}")
            _line(below, journal, groups, wait, _COLOURS[rank], "")
        legend(above, MOST_LINES)
        above.set_ylabel("ms busy")
        _from_zero(above)
    else:
        _busy_map(above, journal, groups)
        _bands(below, journal, groups)
        legend(below)
    below.set_ylabel("ms waiting")
    _from_zero(below)
    above.tick_params(labelbottom=False)
    _mark_changes(above, journal)
    _mark_changes(below, journal)
    _over_the_run(above, journal, span)
    above.set_xlabel("")
    _over_the_run(below, journal, span)
    return to_svg(figure)


def _busy_map(axes: "Axes", journal: PartitionJournal, groups: Sequence[Sequence[Window]]) -> None:
    from matplotlib.colors import LogNorm

    columns = list(zip(*_lines(groups, _busy), strict=True))
    middle = [_median([each for each in column if math.isfinite(each)]) or math.nan for column in columns]
    cells = [[each / mid for each in column] for column, mid in zip(columns, middle, strict=True)]
    edges = [_begin(journal), *(_x(journal, group) + 1 for group in groups)]
    drawn = axes.pcolormesh(
        edges,
        _lanes(journal),
        list(zip(*cells, strict=True)),
        cmap="RdBu_r",
        norm=LogNorm(0.5, 2.0),
        rasterized=True,
    )
    bar = axes.figure.colorbar(drawn, ax=axes, label="of the median", pad=0.01, extend="both")
    bar.set_ticks([0.5, 0.7, 1.0, 1.4, 2.0], labels=["0.5", "0.7", "1", "1.4", "2"])
    bar.minorticks_off()
    axes.set_ylabel("rank")
    axes.invert_yaxis()


def _bands(axes: "Axes", journal: PartitionJournal, groups: Sequence[Sequence[Window]]) -> None:
    by_rank = [_milliseconds(line) for line in _lines(groups, _wait)]
    known = [[each for each in column if math.isfinite(each)] for column in zip(*by_rank, strict=True)]
    parts = [quantiles(column, n=4, method="inclusive") if len(column) > 1 else [math.nan] * 3 for column in known]
    places = [_x(journal, group) for group in groups]
    lowest = [min(column, default=math.nan) for column in known]
    highest = [max(column, default=math.nan) for column in known]
    axes.fill_between(places, lowest, highest, color="#eda83a", alpha=0.25, linewidth=0, label="all ranks")
    low, middle, high = zip(*parts, strict=True)
    axes.fill_between(places, low, high, color="#eda83a", alpha=0.55, linewidth=0, label="middle half of the ranks")
    axes.plot(places, middle, color="#8a5a00", linewidth=1.6, label="median rank", **_dots(groups))


def step_time(journal: PartitionJournal) -> bytes:
    """Return the time of a step over the run, and what the best shares would make of it.

    Raises:
        ValueError: If the journal has no window, so that nothing is known of times.

    """
    groups = _groups("step_time", journal.windows)
    figure, axes = new_figure(2.6)
    measured = [_median([window.step_s for window in group]) for group in groups]
    best = [_median([_best_s(window) for window in group]) for group in groups]
    _line(axes, journal, groups, measured, "#1f6fb4", "a step, measured")
    if journal.ranks > 1 and any(math.isfinite(seconds) for seconds in best):
        _line(axes, journal, groups, best, "#222222", "with the best shares, predicted", linestyle="--")
    axes.set_ylabel("ms")
    _from_zero(axes)
    _mark_changes(axes, journal, "shares change")
    _over_the_run(axes, journal, (_begin(journal), _end(journal)))
    legend(axes)
    return to_svg(figure)


def _best_s(window: Window) -> float | None:
    return None if window.step_s is None or window.gain is None else window.step_s * (1 - window.gain)


def _busy(window: Window) -> Sequence[float | None]:
    return window.busy_s


def _wait(window: Window) -> Sequence[float | None]:
    return window.wait_s


# ---- places of the run ----------------------------------------------------------------------------------------------


def _at(journal: PartitionJournal, epoch: int, batch: int) -> int:
    return epoch * int(journal.run["steps_per_epoch"] or 0) + batch


def _x(journal: PartitionJournal, group: Sequence[Window]) -> float:
    last = group[-1]
    return float(_at(journal, last.epoch, last.batch))


def _begin(journal: PartitionJournal) -> float:
    """Return where the first window began, estimated from the distance to the second."""
    places = [_at(journal, window.epoch, window.batch) for window in journal.windows[:2]]
    return float(max(0, 2 * places[0] - places[1] + 1)) if len(places) == 2 else 0.0


def _end(journal: PartitionJournal) -> float:
    last = journal.windows[-1] if journal.windows else journal.changes[-1]
    return float(_at(journal, last.epoch, last.batch) + 1)


def _groups(where: str, windows: Sequence[Window]) -> list[Sequence[Window]]:
    if not windows:
        raise ValueError(
            f"{where}: journal.windows is empty, so there are no times to draw: the run ended within its first window. "
            "Train for more steps, or give AdaptivePartition fewer `window_steps` or `warmup_steps`."
        )
    count = math.ceil(len(windows) / _MOST_POINTS)
    return [windows[begin : begin + count] for begin in range(0, len(windows), count)]


def _lines(groups: Sequence[Sequence[Window]], of: _ByRank) -> list[list[float]]:
    """Return the numbers of each rank over the run."""
    columns = [[_median(values) for values in zip(*map(of, group), strict=True)] for group in groups]
    return [list(line) for line in zip(*columns, strict=True)]


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return median(known) if known else math.nan


def _milliseconds(line: Sequence[float]) -> list[float]:
    return [1e3 * seconds for seconds in line]


# ---- drawing --------------------------------------------------------------------------------------------------------


def _two_panels(height: float) -> tuple["Figure", tuple["Axes", "Axes"]]:
    figure, axes = new_figure(height)
    axes.remove()
    above, below = figure.subplots(2, 1)
    for panel in (above, below):
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, (above, below)


def _line(
    axes: "Axes",
    journal: PartitionJournal,
    groups: Sequence[Sequence[Window]],
    seconds: Sequence[float],
    colour: str,
    label: str,
    linestyle: str = "-",
) -> None:
    places = [_x(journal, group) for group in groups]
    style: dict[str, Any] = {"color": colour, "label": label, "linewidth": 1.6, "linestyle": linestyle}
    axes.plot(places, _milliseconds(seconds), **style, **_dots(groups))


def _dots(groups: Sequence[Sequence[Window]]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(groups) <= 40 else {}


def _from_zero(axes: "Axes") -> None:
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * highest if math.isfinite(highest) and highest > 0 else 1)


def _lanes(journal: PartitionJournal) -> list[float]:
    return [rank - 0.5 for rank in range(journal.ranks + 1)]


def _mark_changes(axes: "Axes", journal: PartitionJournal, label: str | None = None) -> None:
    moves = journal.changes[1:]
    if not 0 < len(moves) <= _MOST_MARKS:
        return
    for number, change in enumerate(moves):
        named = label if number == 0 else None
        axes.axvline(
            _at(journal, change.epoch, change.batch), color="#8a8a8a", linewidth=0.9, linestyle=":", label=named
        )


def _over_the_run(axes: "Axes", journal: PartitionJournal, span: tuple[float, float]) -> None:
    axes.set_xlim(*span)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"training batch (an epoch has {int(journal.run['steps_per_epoch'] or 0):,})")
