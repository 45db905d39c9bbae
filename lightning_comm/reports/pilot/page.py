"""The page of a pilot, for readers who pay for the cluster, and the sentences on it."""

from collections.abc import Mapping
from typing import Any

from lightning_comm.core.judgement import CONFIDENCE, FEWEST_REPEATS, LIMIT_SPREAD
from lightning_comm.core.quantities import duration, percent
from lightning_comm.planning.pilot.advice import Advice
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT, Summary
from lightning_comm.reports.pieces import html_command, html_paragraphs, html_table, html_text, page
from lightning_comm.reports.pilot.tables import (
    LIMIT_NAME,
    measured_table,
    ratio_text,
    read,
    run_table,
    saved_s,
    time_text,
)

_STYLE = (
    "<style>"
    ".answer{border-left:.5rem solid;padding:.6rem 1.2rem;font-size:1.25rem;background:#f7f7f7}"
    ".yes{border-color:#c0392b}.no{border-color:#2e7d32}.open{border-color:#999}"
    ".note{background:#fff6e0;padding:.6rem 1.2rem}dl.facts{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}"
    ".facts dt{color:#666;font-size:.9rem}.facts dd{margin:0;font-size:1.5rem}</style>"
)
_SANITY = (
    "The loss after so few steps is a sanity check and nothing more: it shows that every strategy trains. Which "
    "accuracy a strategy reaches is seen in a whole run only."
)


def emulated(results: Mapping[str, Any]) -> list[str]:
    """Return what was not real, one sentence each."""
    notes = []
    lab = results["settings"].get("lab")
    if lab:
        links = ", ".join(dict.fromkeys(lab["links"]))
        notes.append(
            f"Hosts and links were emulated: {lab['hosts']} hosts with {lab['devices_per_host']} rank(s) each on one "
            f"machine, joined by links of {links}."
        )
    devices = [device for trial in results["trials"] for device in trial.get("devices", ())]
    if devices:
        first = devices[0]
        notes.append(
            f"Devices were emulated: forward and backward of {first['batch_size']} samples take "
            f"{duration(first['step_s'])}, whatever the machine is."
        )
        late, steps = (sum(device[name] for device in devices) for name in ("overruns", "steps"))
        if late:
            notes.append(
                f"{percent(late / steps)} of the steps overran that time, since the machine was too slow, so they "
                "count as longer than they would be: a longer `--device-ms`, a quieter machine or fewer ranks mend "
                "that."
            )
    return notes


def not_projected(results: Mapping[str, Any]) -> list[str]:
    """Return why the whole run is not known, one sentence a reason."""
    problems: dict[str, list[str]] = {}
    for name, why in results["problems"].items():
        problems.setdefault(why, []).append(f"the job {LIMIT_NAME}" if name == LIMIT else f"`{name}`")
    return [f"The whole run of {', '.join(names)} is not known: {why}." for why, names in problems.items()]


def how_sure(results: Mapping[str, Any], summaries: Mapping[str, Summary]) -> list[str]:
    """Return how far the figures can be trusted, one sentence each."""
    settings, repeats = results["settings"], results["settings"]["repeats"]
    notes = [
        f"{repeats} repeat(s) of {settings['steps']} steps each, of which {settings['warmup_steps']} are not counted; "
        "strategies took turns, and every repeat began with another one. Ratios are taken within a repeat."
    ]
    notes.append(_what_the_interval_is(repeats))
    if repeats > 1:
        notes.append("Brackets after a time of a step or of the run hold the smallest and the largest of the repeats.")
    if LIMIT in summaries:
        spread = summaries[LIMIT].run_step_s.relative
        notes.append(
            f"Without communication a step spreads by {percent(spread)} over the repeats, from the lowest to the "
            f"highest against the median. Shares of that limit are given up to {percent(LIMIT_SPREAD)}."
        )
    if any(one.plan for one in summaries.values()):
        notes.append(
            "The whole run is projected: measured seconds of a step and of a synchronisation, times how often the "
            "run's own learning-rate schedule makes it take them. Validation, checkpoints and start-up are not in it."
        )
    notes += not_projected(results)
    notes.append(_SANITY)
    return notes


def _what_the_interval_is(repeats: int) -> str:
    if repeats < FEWEST_REPEATS:
        return (
            f"With {repeats} repeat(s) the ratios have no interval, so nothing is concluded: it takes {FEWEST_REPEATS} "
            "or more."
        )
    return (
        f"Times as fast as {BASELINE}: the geometric mean of the {repeats} ratios, each within a repeat, and in "
        f"brackets the interval that holds the true ratio in {100 * CONFIDENCE:.0f} % of such pilots (Student's, of "
        f"the logarithms, with {repeats - 1} degrees of freedom), for each strategy by itself. Where it contains 1, "
        "the repeats do not show whether a strategy is faster. Time saved is computed from the same interval."
    )


def html_page(results: Mapping[str, Any], advice: Advice, figure: str | None) -> str:
    """Return the page: the answer first, then what it rests on.

    Args:
        results: The results file.
        advice: The result of :func:`~lightning_comm.planning.pilot.advice.advise`.
        figure: The source of an image, or ``None``.

    """
    summaries = read(results)
    kind = {True: "yes", False: "no", None: "open"}[advice.bottleneck]
    run = run_table(summaries, results["settings"]["cost_per_hour"])
    fake = emulated(results)
    image = f'<img alt="Time of a step and of the whole run under each strategy" src="{figure}">' if figure else ""
    circumstances = {**results["environment"], **_job(results)}
    parts = [
        _STYLE,
        "<h1>Is communication the bottleneck?</h1>",
        f'<p class="answer {kind}">{html_text(advice.headline)}</p>',
        _facts(summaries, advice, results["settings"]["cost_per_hour"]),
        f'<p class="note"><b>Emulated.</b> {html_text(" ".join(fake))}</p>' if fake else "",
        image,
        html_paragraphs(advice.reasons),
        f"<h2>The whole run</h2>{html_table(*run)}" if run else "",
        f"<h2>What was measured</h2>{html_table(*measured_table(summaries))}",
        _failures(results),
        f"<h2>How sure is this?</h2>{html_paragraphs(how_sure(results, summaries))}",
        f"<h2>How to repeat it</h2>{html_command(results['command'])}",
        html_table(["", ""], [[name, str(value)] for name, value in circumstances.items()]),
    ]
    return page("lightning-comm pilot", "".join(parts))


def _facts(summaries: Mapping[str, Summary], advice: Advice, cost_per_hour: float | None) -> str:
    """Return the few main numbers."""
    base, limit, best = (summaries.get(name) for name in (BASELINE, LIMIT, advice.best or ""))
    facts: list[tuple[str, str]] = []
    for of, name in ((limit, LIMIT_NAME), (best, f"with {advice.best}")):
        if of is not None and of.speedup is not None:
            facts.append((f"times as fast as {BASELINE} {name}", ratio_text(of.speedup)))
    if base is not None and base.run_s is not None:
        facts.append((f"the whole run with plain {BASELINE}", duration(base.run_s.median)))
        if best is not None and best.run_s is not None and (saved := saved_s(best, base)) is not None:
            facts.append((f"the whole run with {best.strategy}", duration(best.run_s.median)))
            facts.append(("saved", time_text(*saved)))
            if cost_per_hour is not None:
                facts.append(("cost saved", f"{cost_per_hour * saved[0] / 3600:,.2f}"))
    shown = "".join(f"<div><dd>{html_text(value)}</dd><dt>{html_text(name)}</dt></div>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def _job(results: Mapping[str, Any]) -> dict[str, Any]:
    job = results["job"]
    names = {
        "world_size": "ranks",
        "device": "device",
        "batch_size": "samples a batch and rank",
        "parameters": "parameters",
        "total_steps": "optimizer steps of the run",
    }
    return {shown: f"{job[n]:,}" if isinstance(job[n], int) else job[n] for n, shown in names.items() if job.get(n)}


def _failures(results: Mapping[str, Any]) -> str:
    notes = [f"`{name}` failed in repeat {of['repeat'] + 1}: {of['error']}" for name, of in results["failures"].items()]
    return f"<h2>What failed</h2>{html_paragraphs(notes)}" if notes else ""
