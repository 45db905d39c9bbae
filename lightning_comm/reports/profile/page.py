"""The page of a profile: one HTML file that needs no other, for readers who pay for the cluster."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from lightning_comm.core.key_figures import RunFigures
from lightning_comm.core.quantities import percent
from lightning_comm.core.rank_profile import RankProfile
from lightning_comm.formats.profile import Profile
from lightning_comm.reports.pieces import html_cards, html_figure, html_paragraphs, html_table, html_text, page
from lightning_comm.reports.profile import figures as profile_figures
from lightning_comm.reports.profile.text import figure_rows, how_measured, milliseconds, rate, sentences, size
from lightning_comm.reports.svg import cannot_draw

_NO_FIGURES = (
    "The figures are left out: {}. Once that is mended, "
    "`lightning_comm.reports.profile.page.profile_page(load_profile(folder))` makes the page again, with them."
)


def profile_page(profile: Profile) -> str:
    """Return the page of a run.

    Args:
        profile: What is known of each rank, as :func:`~lightning_comm.load_profile` reads it.

    Raises:
        ValueError: If no rank is in it.

    """
    ranks, run = profile.ranks, profile.figures
    body = [f"<h1>Is communication the bottleneck?</h1><p>{html_text(_about(run, ranks[0]))}</p>"]
    body.append(_cards(run))
    body.append(html_paragraphs(sentences(run)))
    body += _figures(run, ranks) if run.steps else []
    body.append("<h2>Key figures</h2>" + html_table(["mean of a step and rank", "", "share"], figure_rows(run)))
    body.append("<h2>By rank</h2>" + _by_rank(run))
    body.append("<h2>What was sent</h2>" + _by_purpose(run))
    body.append("<h2>How this was measured</h2>" + html_paragraphs(how_measured(run)))
    environment = [[name, str(value)] for name, value in run.environment.items()]
    return page("Communication profile", "".join(body) + html_table(["", ""], environment))


def _about(run: RunFigures, rank: RankProfile) -> str:
    hosts = len({each.host for each in run.ranks})
    warmup = f" after {run.warmup_steps} of warm-up" if run.warmup_steps else ""
    started = float(rank.header.get("started_unix_s", 0.0))
    day = f"{datetime.fromtimestamp(started, timezone.utc):%d %B %Y, %H:%M} UTC. " if started else ""
    return (
        f"{day}{run.environment.get('strategy', 'Training')} on {run.world_size} "
        f"rank{'s' if run.world_size > 1 else ''} and {hosts} host{'s' if hosts > 1 else ''}; "
        f"{run.steps:,} steps{warmup}."
    )


def _cards(run: RunFigures) -> str:
    saved = f"{percent(run.sent_bytes / run.dense_bytes)} of dense fp32" if run.dense_bytes else "nothing is sent"
    link = "no probe to compare with"
    if run.link_bytes_per_s and run.bandwidth_bytes_per_s:
        link = f"{percent(run.bandwidth_bytes_per_s / run.link_bytes_per_s)} of the probed link"
    cards = [
        (percent(run.share_exposed), "of the time, training stood still for communication"),
        (milliseconds(run.step_s), f"a step, {milliseconds(run.exposed_s)} of it exposed communication"),
        (size(run.sent_bytes), f"sent per rank and step: {saved}"),
        (rate(run.bandwidth_bytes_per_s), f"while sending: {link}"),
    ]
    return html_cards(cards)


def _figures(run: RunFigures, ranks: Sequence[RankProfile]) -> list[str]:
    if (why := cannot_draw()) is not None:
        return [f"<p>{html_text(_NO_FIGURES.format(why))}</p>"]
    parts = [
        html_figure("Where the time of a step goes", "", profile_figures.step_by_rank(run)),
    ]
    if any(rank.timeline for rank in ranks):
        clocks = (
            "All ranks on rank 0's clock, which is right to "
            f"{milliseconds(run.clock_error_s)} (half the shortest round trip). "
            if run.world_size > 1
            else ""
        )
        caption = f"{clocks}A dark line begins a step. Green: messages under way while the rank goes on computing."
        parts.append(html_figure("A few steps, rank by rank", caption, profile_figures.timeline(ranks)))
    with_steps = [rank for rank in ranks if rank.kept]
    caption = f"Rank {with_steps[0].rank}. Ranks of one strategy send alike."
    if with_steps[0].stride > 1:
        caption += f" Every {with_steps[0].stride}th step is shown."
    parts.append(html_figure("Bytes per step", caption, profile_figures.bytes_per_step(with_steps[0])))
    if run.untimed_steps < run.steps:
        caption = "Means of neighbouring steps, a fifteenth of the run, over all ranks."
        parts.append(html_figure("Share of communication over the run", caption, profile_figures.shares(with_steps)))
    return parts


def _by_rank(run: RunFigures) -> str:
    header = ["rank", "host", "step", "busy by itself", "exposed", "of it waiting", "Lightning", "clock error"]
    rows = [
        [
            str(rank.rank),
            rank.host,
            *map(milliseconds, (rank.step_s, rank.own_s, rank.exposed_s, rank.wait_s, rank.lightning_s)),
            milliseconds(rank.clock_error_s),
        ]
        for rank in run.ranks
    ]
    return html_table(header, rows)


def _by_purpose(run: RunFigures) -> str:
    rows = [
        [purpose, _count(run.total_payload_bytes, purpose), _count(run.total_wire_bytes, purpose)]
        for purpose in run.total_payload_bytes
    ]
    rows += [[f"{purpose}, outside of steps", "", size(count)] for purpose, count in run.beside_wire_bytes.items()]
    ranks = "the ranks" if run.total_ranks == run.world_size else f"{run.total_ranks} of {run.world_size} ranks"
    return html_table([f"whole run, mean of {ranks}", "handed over", "sent"], rows)


def _count(counts: Mapping[str, float], purpose: str) -> str:
    return size(counts.get(purpose, 0.0))
