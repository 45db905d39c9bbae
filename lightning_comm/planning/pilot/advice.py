"""The advice of a pilot: whether communication is the bottleneck, and what to do about it, in sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_comm.core.judgement import CLAIM_REPEATS, CONFIDENCE, FEWEST_REPEATS, LIMIT_SPREAD, Ratio, doubt
from lightning_comm.core.quantities import duration, percent, times_as_fast
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT, Summary

WORTH = 1.05  # times as fast as DDP; less does not pay for a change of method
BEYOND_LIMIT = 0.02  # a strategy that is faster than the job without communication by more: one was disturbed


@dataclass(frozen=True)
class Advice:
    """A recommendation and its reasons.

    Args:
        headline: The answer in one sentence.
        reasons: What it rests on.
        bottleneck: Whether communication is the bottleneck; ``None`` where that is not decided.
        best: The strategy that is recommended; ``None`` for none.

    """

    headline: str
    reasons: tuple[str, ...]
    bottleneck: bool | None
    best: str | None


def advise(summaries: Mapping[str, Summary], option: str = "--repeats") -> Advice:
    """Return the advice that the measurements support.

    All of it rests on how many times as fast as DDP something is, and on the interval of that ratio. In this order:
    without DDP there is nothing to compare with; with too few repeats there is no interval; where a strategy is
    faster than the job without communication, one of the two is measured wrongly, so nothing is concluded; where even
    the job without communication is not 1.05 times as fast, communication is not the bottleneck; a strategy that is
    1.05 times as fast or more, with its whole interval above 1, is recommended, the fastest of them; where an
    interval contains 1 and such a strategy may be in it, the result is inconclusive; else plain DDP stays.

    Args:
        summaries: What was measured.
        option: By which the user asks for more repeats.

    """
    if BASELINE not in summaries:
        return Advice(
            f"No answer: `{BASELINE}` could not be measured, and everything is compared with it.", (), None, None
        )
    limit = summaries.get(LIMIT)
    ceiling = None if limit is None else limit.speedup
    ranked = sorted(
        (one for one in summaries.values() if one.strategy not in (BASELINE, LIMIT)), key=lambda one: -_mean(one)
    )
    more = f"{option} {2 * len(summaries[BASELINE].repeats)}"
    reasons = [*_without_communication(limit, ranked, more), *map(_speed, ranked)]
    bottleneck = _is_bottleneck(ceiling)
    best = next((one for one in ranked if one.speedup and one.speedup.faster and _pays(_mean(one))), None)
    if (repeats := _too_few(ceiling, ranked)) is not None:
        headline, best = _no_interval(repeats, option), None
    elif best is not None and limit is not None and _contradicts(best, limit):
        headline, bottleneck, best = _in_doubt(best, ceiling, more), None, None
    elif bottleneck is False:
        headline, best = _not_bound(ceiling), None
    elif best is not None:
        headline = f"Try `{best.strategy}`: it is {_shown(best.speedup)}{_of_the_run(best, summaries[BASELINE])}."
        reasons += _equals(best, ranked)
    elif (open_ones := _undecided(ceiling, ranked, bottleneck)) != []:
        headline = _contains_1(open_ones, more)
    else:
        headline = _keep(ranked, ceiling)
    return Advice(headline, tuple(reasons), bottleneck, None if best is None else best.strategy)


def _mean(one: Summary) -> float:
    return one.speedup.mean if one.speedup else 0.0


def _pays(ratio: float) -> bool:
    """Return whether a ratio, as it is printed, pays for a change of method."""
    return round(ratio, 2) >= WORTH


def _contradicts(one: Summary, limit: Summary) -> bool:
    """Return whether a strategy is faster than the job without communication, which cannot be.

    Either by their own ratio, where its interval is above 1 and it exceeds 1 by more than :data:`BEYOND_LIMIT`, or
    because the one is certainly faster than DDP, by a factor that pays, and the other is not.
    """
    against = Ratio.of(limit.run_step_by_repeat, one.run_step_by_repeat)
    if against is not None and against.faster and against.mean > 1 + BEYOND_LIMIT:
        return True
    pays = one.speedup is not None and one.speedup.faster and _pays(one.speedup.mean)
    return pays and _is_bottleneck(limit.speedup) is False


def _in_doubt(best: Summary, ceiling: Ratio | None, more: str) -> str:
    return (
        f"In doubt: `{best.strategy}` is {_shown(best.speedup)}, and the job without communication {_shown(ceiling)}, "
        "though it cannot be the slower of the two. One of them was disturbed: measure again with more repeats "
        f"(`{more}`), more steps or on a quieter machine."
    )


def _not_bound(ceiling: Ratio | None) -> str:
    no_more = " and no more" if ceiling is not None and round(ceiling.mean, 2) > 1 else ""
    return (
        "Not communication-bound: keep plain DDP. Without any communication the job would be "
        f"{_shown(ceiling)}{no_more}."
    )


def _is_bottleneck(ceiling: Ratio | None) -> bool | None:
    """Return whether removing communication is worth something; ``None`` where the interval leaves that open."""
    if ceiling is None or ceiling.interval is None:
        return None
    if not _pays(ceiling.interval[1]) or (ceiling.faster and not _pays(ceiling.mean)):
        return False
    return True if ceiling.faster else None


def _too_few(ceiling: Ratio | None, ranked: Sequence[Summary]) -> int | None:
    """Return how many repeats there are, where no ratio has enough of them for an interval; else ``None``."""
    ratios = [ratio for ratio in (ceiling, *(one.speedup for one in ranked)) if ratio is not None]
    if any(ratio.interval is not None for ratio in ratios):
        return None
    return max((len(ratio.values) for ratio in ratios), default=0)


def _no_interval(repeats: int, option: str) -> str:
    seen = {0: "no repeat has", 1: "1 repeat has", 2: "2 repeats have"}[repeats]
    return (
        f"Inconclusive: {seen} no interval, which takes {FEWEST_REPEATS} or more, so a difference may be noise. "
        f"Measure again with `{option} {CLAIM_REPEATS}`."
    )


def _undecided(ceiling: Ratio | None, ranked: Sequence[Summary], bottleneck: bool | None) -> list[tuple[str, Ratio]]:
    """Return the ratios whose interval contains 1 and also a gain that would pay."""
    named = [(f"`{one.strategy}` is", one.speedup) for one in ranked]
    if not ranked and bottleneck is None:
        named = [("the job without communication is", ceiling)]
    return [
        (name, ratio)
        for name, ratio in named
        if ratio is not None and ratio.undecided and (ratio.interval is None or _pays(ratio.interval[1]))
    ]


def _contains_1(open_ones: Sequence[tuple[str, Ratio]], more: str) -> str:
    name, ratio = open_ones[0]
    if ratio.interval is None:
        return f"Inconclusive: {name} {times_as_fast(ratio.mean)} as plain DDP, in too few repeats for an interval."
    return (
        f"Inconclusive: {name} {_shown(ratio)}. That interval contains 1, so the repeats do not show whether anything "
        f"is gained. Measure again with more repeats (`{more}`), more steps or on a quieter machine."
    )


def _keep(ranked: Sequence[Summary], ceiling: Ratio | None) -> str:
    why = f"no strategy tried is {times_as_fast(WORTH)} or more" if ranked else "no other strategy was measured"
    if ceiling is None:
        return f"Keep plain DDP: {why}."
    but = "but" if _pays(ceiling.mean) else "and"
    return f"Keep plain DDP: without communication the job would be {_shown(ceiling)}, {but} {why}."


def _shown(ratio: Ratio | None) -> str:
    """Return a ratio with its interval."""
    if ratio is None:
        return "not comparable"
    text = f"{times_as_fast(ratio.mean)} as plain DDP"
    if ratio.interval is None:
        return text
    # an end that is not 1 must not be shown as 1
    digits = 4 if any(end != 1 and round(end, 2) == 1 for end in ratio.interval) else 2
    low, high = (f"{end:.{digits}f}" for end in ratio.interval)
    return f"{text} ({low} to {high} with {100 * CONFIDENCE:.0f} % confidence)"


def _of_the_run(best: Summary, base: Summary) -> str:
    if base.run_s is None or best.run_s is None:
        return ""
    saved_s = base.run_s.median * (1 - 1 / _mean(best))
    return f", and saves {duration(saved_s)} of {duration(base.run_s.median)}"


def _without_communication(limit: Summary | None, ranked: Sequence[Summary], more: str) -> list[str]:
    """Return what follows for DDP from the job without communication, and whether that is steady enough to compare."""
    if limit is None:
        return ["The job without communication could not be measured, so what is possible at most is not known."]
    if limit.speedup is None:
        return ["The job without communication has no repeat in common with DDP."]
    notes = [f"Without communication the same job is {_shown(limit.speedup)}; {_as_a_limit(limit, ranked, more)}."]
    if (why := doubt(limit.run_step_s.values)) is not None:
        few = len(limit.repeats) < FEWEST_REPEATS
        so = "do not show how steady it is" if few else f"between repeats, more than {percent(LIMIT_SPREAD)}"
        notes.append(f"Shares of that limit are left out: {why} {so}.")
    return notes


def _as_a_limit(limit: Summary, ranked: Sequence[Summary], more: str) -> str:
    """Return how much can be gained at most, by the job without communication; or that strategies came out faster."""
    beyond = [one for one in ranked if round(_mean(one), 2) > round(_mean(limit), 2)]
    sure = [one for one in beyond if _contradicts(one, limit)]
    if sure:
        return f"{_names(sure)} came out faster, which cannot be, so one of them is in doubt: measure again (`{more}`)"
    if beyond:
        return f"{_names(beyond)} came out faster, which is within the noise of the repeats"
    if round(_mean(limit), 2) <= 1:
        return "so the repeats show nothing that sending less could gain"
    return "sending less can make it no faster"


def _names(ones: Sequence[Summary]) -> str:
    names = [f"`{one.strategy}`" for one in ones]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _speed(one: Summary) -> str:
    if one.speedup is None:
        return f"`{one.strategy}` has no repeat in common with DDP."
    of = "the whole run" if one.plan else "the measured steps"
    text = f"`{one.strategy}` is {_shown(one.speedup)}, over {of}"
    if one.speedup.interval is None:
        return f"{text}; {len(one.speedup.values)} repeat(s) have no interval."
    if one.speedup.slower:
        return f"{text}: it is slower."
    return f"{text}." if one.speedup.faster else f"{text}: inconclusive, since the interval contains 1."


def _equals(best: Summary, ranked: Sequence[Summary]) -> list[str]:
    """Name the strategies whose difference from the best is within the noise of the repeats."""
    near = [
        one
        for one in ranked
        if one is not best
        and (against := Ratio.of(one.run_step_by_repeat, best.run_step_by_repeat)) is not None
        and against.undecided
    ]
    if not near:
        return []
    return [f"The repeats do not tell {_names(near)} from `{best.strategy}`: the interval of their ratio contains 1."]
