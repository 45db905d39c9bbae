"""The end of a pilot: the tables and the advice on the terminal, the figure, and the page."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_comm.core.judgement import Spread
from lightning_comm.core.quantities import times_as_fast
from lightning_comm.planning.pilot.advice import advise
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT, Summary
from lightning_comm.reports.pieces import text_table
from lightning_comm.reports.pilot.page import emulated, html_page, not_projected
from lightning_comm.reports.pilot.tables import measured_table, read, run_table, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COMPUTE, _COMMUNICATION, _DOTS = "#9db8d2", "#d9822b", "#333333"


def write_report(results: dict[str, Any], folder: Path) -> int:
    """Show what a pilot found and write its page; return 1 where a strategy failed, else 0."""
    summaries = read(results)
    if not summaries:
        print("Nothing was measured.")
        return 1
    advice = advise(summaries)
    run = run_table(summaries, results["settings"]["cost_per_hour"])
    print()
    print(text_table(*measured_table(summaries)))
    if run is not None:
        print()
        print(text_table(*run))
    print()
    for sentence in (*advice.reasons, *not_projected(results), *emulated(results)):
        print(sentence)
    print(f"\n{advice.headline}\n")
    figure = _figure_source(summaries)
    if figure is None:
        print("matplotlib is not installed, so the page has no figure.")
    (folder / "pilot.html").write_text(html_page(results, advice, figure))
    for what, name in (("Page", "pilot.html"), ("Numbers", "pilot.json")):
        print(f"{what + ':':<9}{(folder / name).resolve()}")
    return 1 if results["failures"] else 0


def _figure_source(summaries: Mapping[str, Summary]) -> str | None:
    """Return the figure as the source of an image, or ``None`` without matplotlib."""
    try:
        # `Figure` itself, since pyplot looks for a display
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    whole_run = [one for one in summaries.values() if one.run_s is not None]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(summaries)), layout="constrained")
    columns = figure.subplots(1, 2, squeeze=False)[0] if whole_run else [figure.subplots()]
    _draw_steps(columns[0], summaries)
    if whole_run:
        _draw_run(columns[1], whole_run)
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue().encode()).decode()


def _draw_steps(axes: "Axes", summaries: Mapping[str, Summary]) -> None:
    names = [shown_name(name) for name in summaries]
    limit = summaries.get(LIMIT)
    totals = [1000 * one.run_step_s.median for one in summaries.values()]
    if limit is None:
        axes.barh(names, totals, color=_COMPUTE)
    else:
        compute = [min(total, 1000 * limit.run_step_s.median) for total in totals]
        axes.barh(names, compute, color=_COMPUTE, label="without communication")
        rest = [total - own for total, own in zip(totals, compute, strict=True)]
        axes.barh(names, rest, left=compute, color=_COMMUNICATION, label="communication not hidden by compute")
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.25, -0.28), ncols=2)
    _dots(axes, names, [one.run_step_s for one in summaries.values()], 1000)
    axes.set_title("A step, with its share of the synchronisations", loc="left", fontsize=11)
    axes.set_xlabel("ms; dots are the repeats")
    _tidy(axes)


def _draw_run(axes: "Axes", summaries: list[Summary]) -> None:
    names = [shown_name(one.strategy) for one in summaries]
    times = [one.run_s for one in summaries if one.run_s is not None]
    longest = max(max(each.values) for each in times)
    unit_s, unit = (3600, "hours") if longest >= 7200 else (60, "minutes") if longest >= 120 else (1, "seconds")
    axes.barh(names, [each.median / unit_s for each in times], color="#c9d7c4")
    _dots(axes, names, times, 1 / unit_s)
    for place, one in enumerate(summaries):
        if one.strategy != BASELINE and one.speedup is not None:
            text = times_as_fast(one.speedup.mean)
            axes.annotate(text, (0, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_title("The whole run, projected; against ddp", loc="left", fontsize=11)
    axes.set_xlabel(unit)
    _tidy(axes)


def _dots(axes: "Axes", names: list[str], spreads: list[Spread], factor: float) -> None:
    for name, spread in zip(names, spreads, strict=True):
        values = [factor * value for value in spread.values]
        axes.plot(values, [name] * len(values), "o", color=_DOTS, markersize=3)


def _tidy(axes: "Axes") -> None:
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="x")
