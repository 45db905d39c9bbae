"""What a pilot shows: tables for the terminal, and one page for whoever pays for the cluster."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_comm.planning.pilot import BASELINE, LIMIT, Spread, Summary, Trial, summarise
from lightning_comm.planning.pilot_advice import LIMIT_SPREAD, Advice
from lightning_comm.planning.projection import RunPlan
from lightning_comm.planning.report import duration, html_table, html_text, megabytes, page, percent

Table = tuple[list[str], list[list[str]]]

_UNITS = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 0.001, "ms"))  # from which time on each is used
_LIMIT_NAME = "without communication"
_STYLE = (
    "<style>body{max-width:76rem}table{font-size:.85rem;display:block;overflow-x:auto}"
    "td{white-space:nowrap}th,td{padding:.3rem .6rem}th{vertical-align:bottom}"
    ".answer{border-left:.5rem solid;padding:.6rem 1.2rem;font-size:1.25rem;background:#f7f7f7}"
    ".yes{border-color:#c0392b}.no{border-color:#2e7d32}.open{border-color:#999}"
    ".note{background:#fff6e0;padding:.6rem 1.2rem}dl.facts{display:flex;flex-wrap:wrap;gap:1rem 2.5rem}"
    ".facts dt{color:#666;font-size:.9rem}.facts dd{margin:0;font-size:1.5rem}</style>"
)
_SANITY = (
    "The loss after so few steps is a sanity check and nothing more: it shows that every strategy trains. Which "
    "accuracy a strategy reaches is seen in a whole run only."
)


def read(results: Mapping[str, Any]) -> dict[str, Summary]:
    """Return the summaries of a results file, DDP first and the limit last; strategies that failed are left out."""
    trials = [Trial.read(record) for record in results["trials"] if record["strategy"] not in results["failures"]]
    plans = {
        name: RunPlan(plan["total_steps"], plan["gradient_steps"], tuple(plan["round_ends"]))
        for name, plan in results["plans"].items()
    }
    found = summarise(trials, plans)
    names = [name for name in (*results["settings"]["strategies"], LIMIT) if name in found]
    return {name: found[name] for name in names}


def measured_table(summaries: Mapping[str, Summary]) -> Table:
    """Return what was measured, one row a strategy: medians, and in brackets the range of the repeats."""
    header = ["", "step (ms)", "sync (ms)", "with syncs (ms)", "samples/s", "sent/step", "exposed", "x ddp", "x limit"]
    rows = [
        [
            shown_name(one.strategy),
            _number(one.step_s, 1000),
            _number(one.sync_s, 1000),
            _number(one.run_step_s, 1000),
            "-" if one.samples_per_s is None else f"{one.samples_per_s.median:,.0f}",
            "-" if one.step_bytes is None else megabytes(one.step_bytes.median, 2),
            "-" if one.exposed is None else percent(one.exposed.median),
            _number(one.to_baseline, 1, 2),
            _number(one.to_limit, 1, 2),
        ]
        for one in summaries.values()
    ]
    return header, rows


def run_table(summaries: Mapping[str, Summary], cost_per_hour: float | None) -> Table | None:
    """Return what the whole run will take, one row a strategy; ``None`` where that is known of none."""
    header = ["whole run", "time", "saved against ddp", "synchronisations", "sent per rank", "loss after the pilot"]
    if cost_per_hour is not None:
        header.insert(3, "cost saved")
    base = summaries.get(BASELINE)
    rows = []
    for one in summaries.values():
        if one.run_s is None or one.plan is None:
            continue
        saved = None if base is None else saved_s(one, base)
        row = [
            shown_name(one.strategy),
            _time(one.run_s),
            "-" if saved is None or one is base else _time(saved),
            f"{one.plan.synchronisations:,}",
            "-" if one.run_bytes is None else megabytes(one.run_bytes.median),
            _number(one.loss, 1, 3),
        ]
        if cost_per_hour is not None:
            price = cost_per_hour / 3600
            row.insert(3, "-" if saved is None or one is base else f"{price * saved.median:,.2f}")
        rows.append(row)
    return (header, rows) if rows else None


def saved_s(one: Summary, base: Summary) -> Spread | None:
    """Return the seconds of the whole run that a strategy saves against DDP, repeat by repeat."""
    if one.run_s is None or base.run_s is None or one.to_baseline is None:
        return None
    return Spread(tuple(base.run_s.median * (1 - ratio) for ratio in one.to_baseline.values))


def shown_name(strategy: str) -> str:
    """Return what a strategy is called in tables."""
    return _LIMIT_NAME if strategy == LIMIT else strategy


def emulated(results: Mapping[str, Any]) -> list[str]:
    """Return what was not real, one sentence each."""
    said = []
    lab = results["settings"].get("lab")
    if lab:
        links = ", ".join(dict.fromkeys(lab["links"]))
        said.append(
            f"Hosts and links were emulated: {lab['hosts']} hosts with {lab['devices_per_host']} rank(s) each on one "
            f"machine, joined by links of {links}."
        )
    devices = [device for trial in results["trials"] for device in trial.get("devices", ())]
    if devices:
        first = devices[0]
        said.append(
            f"Devices were emulated: forward and backward of {first['batch_size']} samples take "
            f"{duration(first['step_s'])}, whatever the machine is."
        )
        late, steps = (sum(device[name] for device in devices) for name in ("overruns", "steps"))
        if late:
            said.append(
                f"{percent(late / steps)} of the steps overran that time, since the machine was too slow, so they "
                "count as longer than they would be: a longer --device-ms, a quieter machine or fewer ranks mend that."
            )
    return said


def not_projected(results: Mapping[str, Any]) -> list[str]:
    """Return why the whole run is not known, one sentence a reason."""
    problems: dict[str, list[str]] = {}
    for name, why in results["problems"].items():
        problems.setdefault(why, []).append(f"the job {_LIMIT_NAME}" if name == LIMIT else f"`{name}`")
    return [f"The whole run of {', '.join(names)} is not known: {why}." for why, names in problems.items()]


def how_sure(results: Mapping[str, Any], summaries: Mapping[str, Summary]) -> list[str]:
    """Return how far the figures can be trusted, one sentence each."""
    settings, repeats = results["settings"], results["settings"]["repeats"]
    said = [
        f"{repeats} repeat(s) of {settings['steps']} steps each, of which {settings['warmup_steps']} are not counted; "
        "strategies took turns, and every repeat began with another one. Ratios are taken within a repeat."
    ]
    if repeats > 1:
        said.append(
            f"Brackets hold the smallest and largest of the {repeats} repeats; if repeats are independent, they "
            f"enclose the true median with a probability of {percent(1 - 2.0 ** (1 - repeats))}."
        )
    if LIMIT in summaries:
        spread = summaries[LIMIT].run_step_s.relative
        said.append(
            f"Without communication the middle half of the repeats spreads by {percent(spread)} of the median; above "
            f"{percent(LIMIT_SPREAD)} the pilot calls its result inconclusive."
        )
    if any(one.plan for one in summaries.values()):
        said.append(
            "The whole run is projected: measured seconds of a step and of a synchronisation, times how often the "
            "run's own learning-rate schedule makes it take them. Validation, checkpoints and start-up are not in it."
        )
    said += not_projected(results)
    said.append(_SANITY)
    return said


def html_page(results: Mapping[str, Any], advice: Advice, figure: str | None) -> str:
    """Return the page: the answer first, then what it rests on.

    Args:
        results: The results file.
        advice: What :func:`~lightning_comm.planning.pilot_advice.advise` says of it.
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
        _paragraphs(advice.reasons),
        f"<h2>The whole run</h2>{html_table(*run)}" if run else "",
        f"<h2>What was measured</h2>{html_table(*measured_table(summaries))}",
        _failures(results),
        f"<h2>How sure is this?</h2>{_paragraphs(how_sure(results, summaries))}",
        f"<h2>How to repeat it</h2><p><code>{html.escape(results['command'])}</code></p>",
        html_table(["", ""], [[name, str(value)] for name, value in circumstances.items()]),
    ]
    return page("lightning-comm pilot", "".join(parts))


def _facts(summaries: Mapping[str, Summary], advice: Advice, cost_per_hour: float | None) -> str:
    """Return the few numbers that a reader in a hurry wants."""
    base, limit = summaries.get(BASELINE), summaries.get(LIMIT)
    facts: list[tuple[str, str]] = []
    if limit is not None and limit.to_baseline is not None:
        facts.append(("of DDP's time is communication", percent(max(0.0, 1 - limit.to_baseline.median))))
    if base is not None and base.run_s is not None:
        facts.append(("the whole run with plain DDP", duration(base.run_s.median)))
        best = summaries.get(advice.best or "")
        if best is not None and best.run_s is not None and (saved := saved_s(best, base)) is not None:
            facts.append((f"the whole run with {best.strategy}", duration(best.run_s.median)))
            facts.append(("saved", _time(saved)))
            if cost_per_hour is not None:
                facts.append(("cost saved", f"{cost_per_hour * saved.median / 3600:,.2f}"))
    shown = "".join(f"<div><dd>{value}</dd><dt>{html.escape(name)}</dt></div>" for name, value in facts)
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
    said = [f"`{name}` failed in repeat {of['repeat'] + 1}: {of['error']}" for name, of in results["failures"].items()]
    return f"<h2>What failed</h2>{_paragraphs(said)}" if said else ""


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{html_text(text)}</p>" for text in sentences)


def _number(spread: Spread | None, factor: float, digits: int = 1) -> str:
    if spread is None:
        return "-"
    low, high = spread.range
    median, low_text, high_text = (f"{factor * value:.{digits}f}" for value in (spread.median, low, high))
    return median if low_text == high_text else f"{median} ({low_text}-{high_text})"


def _time(spread: Spread) -> str:
    """Return a time and the range of the repeats, in one unit."""
    largest = max(abs(value) for value in spread.values)
    unit_s, unit = next((size, name) for least, size, name in _UNITS if largest >= least)
    low, high = spread.range
    median, low_text, high_text = (f"{value / unit_s:.1f}" for value in (spread.median, low, high))
    if low_text == high_text:
        return f"{median} {unit}"
    return f"{median} ({low_text}{' to ' if low < 0 else '-'}{high_text}) {unit}"
