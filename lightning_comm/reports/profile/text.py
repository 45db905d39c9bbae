"""The text of a profile's report, in sentences and rows, for the terminal and for the page."""

from lightning_comm.core.key_figures import RunFigures
from lightning_comm.core.quantities import megabytes, percent, times_as_fast
from lightning_comm.core.rank_profile import FEWEST_TO_COMPARE
from lightning_comm.reports.pieces import text_table

FigureRow = tuple[str, str, str]
_LITTLE = 0.05  # a share below which nothing is made of it


def milliseconds(seconds: float) -> str:
    """Return a time in ms."""
    return f"{1e3 * seconds:,.2f} ms"


def rate(bytes_per_s: float | None) -> str:
    """Return a rate in Mbit/s, as networks are sold."""
    if bytes_per_s is None:
        return "unknown"
    megabits = 8 * bytes_per_s / 1e6
    return f"{megabits:,.0f} Mbit/s" if megabits >= 10 else f"{megabits:,.2f} Mbit/s"


def size(count: float) -> str:
    """Return a number of bytes as people read it, in units of powers of 10."""
    return megabytes(count) if count >= 1e5 or count == 0 else f"{count / 1e3:,.1f} kB"


def figure_rows(run: RunFigures) -> list[FigureRow]:
    """Return the key figures of a run: what, how much, and what share of a step or of what."""
    rows = [
        ("step", milliseconds(run.step_s), ""),
        ("communication under way", milliseconds(run.comm_s), percent(run.share_busy)),
        ("exposed communication", milliseconds(run.exposed_s), percent(run.share_exposed)),
        ("  of it transfer", milliseconds(run.transfer_s), _of_step(run, run.transfer_s)),
        ("  of it waiting for slower ranks", milliseconds(run.wait_s), _of_step(run, run.wait_s)),
        ("Lightning's own collectives", milliseconds(run.lightning_s), _of_step(run, run.lightning_s)),
        ("metrics and your own collectives", milliseconds(run.other_s), _of_step(run, run.other_s)),
        ("sent per rank and step", size(run.sent_bytes), _of_dense(run)),
        ("achieved while sending", rate(run.bandwidth_bytes_per_s), _of_link(run)),
    ]
    if run.link_bytes_per_s is not None:
        rows.append(("the link, as probed", rate(run.link_bytes_per_s), ""))
    return rows


def _of_step(run: RunFigures, seconds: float) -> str:
    return percent(seconds / run.step_s) if run.step_s > 0 else ""


def _of_dense(run: RunFigures) -> str:
    return f"{percent(run.sent_bytes / run.dense_bytes)} of dense fp32" if run.dense_bytes > 0 else ""


def _of_link(run: RunFigures) -> str:
    if run.bandwidth_bytes_per_s is None or not run.link_bytes_per_s:
        return ""
    return f"{percent(run.bandwidth_bytes_per_s / run.link_bytes_per_s)} of the link"


def sentences(run: RunFigures) -> list[str]:
    """Return what the figures mean, one finding a sentence."""
    if run.world_size == 1:
        return ["One process: nothing is sent, so there is nothing to save."]
    notes = [f"The profiler stopped on rank {rank}: {reason}" for rank, reason in run.stopped.items()]
    if run.steps == 0:
        before = "`load_profile` reads what the ranks' files hold from before."
        return [*notes, before if notes else "No step was measured."]
    notes.append(
        f"Training stood still for communication {percent(run.share_exposed)} of the time: "
        f"{_of_step(run, run.transfer_s)} in transfer, which is the most that sending less can win, and "
        f"{_of_step(run, run.wait_s)} in waiting for slower ranks."
    )
    if run.share_exposed < _LITTLE:
        notes.append("Communication is not the bottleneck of this run.")
    elif run.wait_s > run.transfer_s:
        look = ": look at the slow rank" if run.slow_rank is not None else ""
        notes.append(f"Most of it is waiting, which a faster network would not mend{look}.")
    if run.slow_rank is None and run.steps < FEWEST_TO_COMPARE:
        few = f"{run.steps} steps are too few, {FEWEST_TO_COMPARE} are needed"
        notes.append(f"No rank is named as the slow one: {few}.")
    elif run.slow_rank is None and sum(rank.steps > 0 for rank in run.ranks) > 1:
        notes.append("No rank stands out: none is busy by itself longer than the others, step by step.")
    elif run.slow_rank is not None:
        host = next(rank.host for rank in run.ranks if rank.rank == run.slow_rank)
        notes.append(
            f"Rank {run.slow_rank} on {host} is the slow one: by itself it is {times_as_fast(1 / (1 + run.slower_by))} "
            "as the others (median)."
        )
    if run.untimed_steps:
        notes.append(
            f"In {run.untimed_steps:,} of {run.steps:,} steps the times of communication are not known; means of them "
            "leave these steps out."
        )
    if run.total_ranks < run.world_size:
        notes.append(f"Totals are means of {run.total_ranks} of {run.world_size} ranks, which have measured all steps.")
    return notes


def summary(run: RunFigures) -> str:
    """Return the summary for the terminal."""
    if run.steps == 0:
        return " ".join(["CommProfiler:", *sentences(run)])
    head = (
        f"CommProfiler: {run.steps:,} steps on {run.world_size} ranks"
        f"{f', after {run.warmup_steps} of warm-up' if run.warmup_steps else ''}; means of a step and rank"
    )
    table = text_table(["", "per step", "share"], [list(row) for row in figure_rows(run)])
    return "\n".join([head, table, *sentences(run)])


def how_measured(run: RunFigures) -> list[str]:
    """Return what the figures are and are not."""
    notes = [
        "A step is a training batch, from its start to the start of the next: loading, forward, backward, optimizer "
        "and callbacks are in, validation is not. Bytes are those that a ring all-reduce, or the like for other "
        "messages, sends from each rank on average.",
        "Messages of this package's strategies are timed one by one. For gradients that DDP sends, torch measures from "
        "the first all-reduce of a backward to the end of the last, and how long compute went on beside it.",
        "Waiting: in rounds, the time until all ranks had met. Under DDP, what a rank stood still beyond the rank that "
        "stood still least in that step, which came last. The rest is transfer. Gaps between the messages of a "
        "backward count as sending, so the achieved rate is a lower bound where compute sets the pace.",
    ]
    if run.world_size > 1:
        agree = milliseconds(run.clock_error_s)
        notes.append(f"Clocks were compared with rank 0's before and after training; they agree to {agree}.")
    if "EmulatedDevice" in run.environment.get("callbacks", ()):
        notes.append("Devices were emulated: their speed is a setting, not a measurement.")
    return notes
