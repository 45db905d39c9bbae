"""A pilot's answer in plain words: whether communication is the bottleneck, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_comm.planning.pilot import BASELINE, LIMIT, Spread, Summary
from lightning_comm.planning.report import duration, percent

LIMIT_SPREAD = 0.02  # where the limit itself spreads more, differences are noise
WORTH = 0.05  # of the run's time; a smaller saving does not pay for a change of method


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Args:
        headline: The answer in one sentence.
        reasons: What it rests on.
        bottleneck: Whether communication is the bottleneck; ``None`` where that cannot be said.
        best: The strategy that is recommended; ``None`` for none.

    """

    headline: str
    reasons: tuple[str, ...]
    bottleneck: bool | None
    best: str | None


def advise(summaries: Mapping[str, Summary]) -> Advice:
    """Return the advice that the measurements support.

    In this order: without DDP or the limit there is nothing to compare with; with one repeat, or where the limit
    spreads more than 2 %, the result is inconclusive; where even the limit saves less than 5 % communication is not the
    bottleneck; where no strategy saves 5 %, or some repeat saves nothing, plain DDP stays; else the one that saves most
    is named.
    """
    missing = [name for name in (BASELINE, LIMIT) if name not in summaries]
    if missing:
        return Advice(
            f"No answer: `{missing[0]}` could not be measured, and everything is compared with it.", (), None, None
        )
    limit = summaries[LIMIT]
    share = _share(limit.to_baseline)
    ranked = sorted(
        (one for one in summaries.values() if one.strategy not in (BASELINE, LIMIT)), key=lambda one: _middle(one)
    )
    reasons = [_communication(share, limit), *(_saving(one) for one in ranked)]
    bottleneck = share >= WORTH
    if (doubt := _doubt(limit.run_step_s)) is not None:
        return Advice(f"Inconclusive: {doubt}", tuple(reasons), None, None)
    if not bottleneck:
        return Advice(
            "Not communication-bound: keep plain DDP. Removing all communication would save "
            f"{percent(max(0.0, share))} of the time.",
            tuple(reasons),
            False,
            None,
        )
    best = ranked[0] if ranked else None
    if best is None or 1 - _middle(best) < WORTH or _certain(best) >= 1:
        return Advice(
            f"Keep plain DDP: communication costs {percent(share)} of its time, but none of the strategies tried saves "
            f"{percent(WORTH)} of it or more, and something in every repeat.",
            tuple(reasons),
            True,
            None,
        )
    return Advice(
        f"Try `{best.strategy}`: it takes {percent(1 - _middle(best))} off the time of plain DDP"
        f"{_of_the_run(best, summaries[BASELINE])}.",
        (*reasons, *_equals(ranked)),
        True,
        best.strategy,
    )


def _doubt(limit_s: Spread) -> str | None:
    """Return why differences may be noise, or ``None``."""
    if len(limit_s.values) == 1:
        return "one repeat does not show how much figures spread. Measure again with --repeats 5."
    if limit_s.relative > LIMIT_SPREAD:
        return (
            f"without any communication the step already spreads by {percent(limit_s.relative)} between repeats, more "
            f"than the {percent(LIMIT_SPREAD)} up to which differences mean something. Measure again on a quieter "
            "machine, with more steps or more repeats."
        )
    return None


def _of_the_run(best: Summary, base: Summary) -> str:
    if base.run_s is None or best.run_s is None:
        return ""
    return f", {duration((1 - _middle(best)) * base.run_s.median)} of {duration(base.run_s.median)}"


def _range(low: float, high: float) -> str:
    return "" if low == high else f" ({percent(low)} to {percent(high)} in the repeats)"


def _middle(one: Summary) -> float:
    return one.to_baseline.median if one.to_baseline else float("inf")


def _certain(one: Summary) -> float:
    return one.to_baseline.range[1] if one.to_baseline else float("inf")


def _share(limit_to_baseline: Spread | None) -> float:
    return 1 - limit_to_baseline.median if limit_to_baseline else 0.0


def _communication(share: float, limit: Summary) -> str:
    low, high = limit.to_baseline.range if limit.to_baseline else (1.0, 1.0)
    return (
        f"Communication that compute does not hide costs plain DDP {percent(share)} of its time"
        f"{_range(1 - high, 1 - low)}: that is what the same job without communication saves."
    )


def _saving(one: Summary) -> str:
    if one.to_baseline is None:
        return f"`{one.strategy}` has no repeat in common with DDP."
    low, high = one.to_baseline.range
    of = "the whole run" if one.plan else "the measured steps"
    return f"`{one.strategy}` takes {percent(one.to_baseline.median)} of DDP's time over {of}{_range(low, high)}."


def _equals(ranked: list[Summary]) -> list[str]:
    """Name those that the repeats cannot tell from the best."""
    best = ranked[0].to_baseline
    if best is None:
        return []
    near = [one.strategy for one in ranked[1:] if one.to_baseline and one.to_baseline.range[0] <= best.range[1]]
    if not near:
        return []
    names = " and ".join(f"`{name}`" for name in near)
    return [f"The repeats do not tell {names} from `{ranked[0].strategy}`: their ranges overlap."]
