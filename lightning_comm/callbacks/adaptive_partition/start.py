"""The start of a partitioned run: its plan and bounds, as chosen, replayed, or restored from a stopped run."""

from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.core.adaptive_partition.shares import UNBOUNDED, proportional_sizes
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.formats.adaptive_partition import PartitionJournal, Window

_WHERE = "AdaptivePartition"
_STATE_VERSION = 1


@dataclass(frozen=True)
class StartOfRun:
    """The state that a partitioned run begins with, the same on all ranks.

    Args:
        run: The properties of the run that a journal must share.
        lo: The least that each rank takes.
        hi: The most.
        plan: Which shares hold from where.
        why: The reasons for the changes in it, by place.
        windows: The windows before a resume.
        balancer: What is known of the ranks' speeds, if the ranks are the same as before.
        replays: Whether the plan is that of an earlier run.

    """

    run: dict[str, Any]
    lo: tuple[int, ...]
    hi: tuple[int, ...]
    plan: PartitionPlan
    why: dict[BatchIndex, str] = field(default_factory=lambda: {BatchIndex(0, 0): "start"})
    windows: list[Window] = field(default_factory=list)
    balancer: dict[str, Any] | None = None
    replays: bool = False

    def allows(self, sizes: tuple[int, ...]) -> bool:
        """Whether shares are within the bounds."""
        return all(least <= size <= most for least, size, most in zip(self.lo, sizes, self.hi, strict=True))


def chosen_start(
    settings: PartitionSettings, loaders: list[PartitionedLoader], ranks: int, has_batch_norm: bool
) -> StartOfRun:
    """Return the start of a run that neither replays nor resumes another.

    Args:
        settings: What the user chose.
        loaders: Those of the training data, alike on all ranks.
        ranks: How many ranks share the batch.
        has_batch_norm: Whether the model has layers that cannot train on one sample.

    Raises:
        ValueError: On all ranks alike, if what the user chose does not fit the data.

    """
    first = loaders[0].settings
    total = int(first["global_batch_size"])
    lo, hi = settings.bounds(ranks, total, has_batch_norm)
    run = {
        **first,
        "ranks": ranks,
        "steps_per_epoch": len(loaders[0]),
        "min_per_rank": list(lo),
        "max_per_rank": [None if most == UNBOUNDED else most for most in hi],
    }
    plan = PartitionPlan(settings.first_sizes(ranks, total, lo, hi), hi=hi, lo=lo)
    _check_merged_batch(loaders, hi)
    return StartOfRun(run, lo, hi, plan)


def replayed_start(start: StartOfRun, journal: PartitionJournal, path: str) -> StartOfRun:
    """Return the start of a run that takes the shares of an earlier one at the same steps.

    Args:
        start: The one that was chosen.
        journal: Of the earlier run.
        path: Where it was read, for messages.

    Raises:
        ValueError: On all ranks alike, if it is the journal of another kind of run.

    """
    different = journal.mismatch(start.run)
    if different:
        raise ValueError(
            f"{_WHERE}: `replay` must be the journal of a run like this one; got {path!r}, which differs: "
            f"{'; '.join(different)}. Restore these, or leave `replay` out."
        )
    outside = [list(change.sizes) for change in journal.changes if not start.allows(change.sizes)]
    if outside:
        raise ValueError(
            f"{_WHERE}: `replay` must keep to the bounds of this run; got {path!r}, in which ranks take "
            f"{outside[0]} samples, with at least {list(start.lo)} and at most {list(start.hi)}. Change "
            "`min_per_rank` or `max_per_rank`, or leave `replay` out."
        )
    why = {change.place: "replay" for change in journal.changes}
    return replace(start, plan=journal.plan(start.hi, start.lo), why=why, replays=True)


def resumed_start(start: StartOfRun, saved: dict[str, Any], place: BatchIndex, *, fixed: bool) -> StartOfRun:
    """Return the start of a run that resumes from a checkpoint.

    Args:
        start: The one that was chosen.
        saved: The state from the checkpoint.
        place: The first batch whose shares are still open.
        fixed: Whether the chosen shares hold, whatever they were before.

    """
    if saved.get("version") != _STATE_VERSION:
        rank_zero_warn(
            f"{_WHERE}: the checkpoint holds shares of version {saved.get('version')!r}, which this version of "
            f"lightning_comm cannot read. The run goes on from the shares {list(start.plan.sizes)}, and measures "
            "anew."
        )
        return start
    before, now = saved["run"], start.run
    if any(before[name] != now[name] for name in ("ranks", "global_batch_size")):
        rank_zero_warn(
            f"{_WHERE}: the run is resumed on {now['ranks']} ranks with a global batch of {now['global_batch_size']}, "
            f"and was stopped on {before['ranks']} ranks with one of {before['global_batch_size']}. It goes on from "
            f"the shares {list(start.plan.sizes)}, and measures anew."
        )
        return replace(start, why={BatchIndex(0, 0): f"start, resumed at batch {place.batch} of epoch {place.epoch}"})
    chosen = start.plan.sizes
    start.plan.load_state_dict(saved["plan"])
    resumed = replace(
        start,
        why={BatchIndex(epoch, batch): why for epoch, batch, why in saved["record"]["why"]},
        windows=[Window(**each) for each in saved["record"]["windows"]],
        balancer=saved["balancer"],
    )
    plan = resumed.plan
    held = plan.sizes_at(place)
    to_come = [held, *(change.sizes for change in plan.changes if change.place > place)]
    if fixed:
        _restart(resumed, place, chosen, "resumed with other shares")
    elif not all(map(resumed.allows, to_come)):
        within = proportional_sizes(sum(held), to_come[-1], start.lo, start.hi)
        _restart(resumed, place, within, "resumed with other bounds")
    return resumed


def state_of(
    run: dict[str, Any], plan: PartitionPlan, balancer: dict[str, Any] | None, record: dict[str, Any]
) -> dict[str, Any]:
    """Return the state that :func:`resumed_start` restores; alike on all ranks, in plain types."""
    return {
        "version": _STATE_VERSION,
        "run": dict(run),
        "plan": plan.state_dict(),
        "balancer": balancer,
        "record": record,
    }


def warn_of_single_samples(loaders: list[PartitionedLoader], ranks: int) -> None:
    """Warn if a last batch leaves a rank one sample, or a dummy, which BatchNorm may refuse in the middle of a run."""
    for loader in loaders:
        left = int(loader.settings["samples"]) % int(loader.settings["global_batch_size"])
        if loader.settings["tail"] == "keep" and 0 < left < 2 * ranks:
            rank_zero_warn(
                f"{_WHERE}: the last batch of an epoch has {left} samples for {ranks} ranks, so some have one, and "
                "BatchNorm cannot train on one value per channel. Give the loader `tail='drop'` or `tail='merge'`."
            )


def _restart(start: StartOfRun, place: BatchIndex, sizes: tuple[int, ...], why: str) -> None:
    if start.plan.sizes_at(place) != sizes or start.plan.changes[-1].place > place:
        start.plan.restart_at(place, sizes)
        start.why[place] = why


def _check_merged_batch(loaders: list[PartitionedLoader], hi: tuple[int, ...]) -> None:
    for loader in loaders:
        samples, total = int(loader.settings["samples"]), int(loader.settings["global_batch_size"])
        last = total + samples % total
        if loader.settings["tail"] == "merge" and sum(hi) < last:
            raise ValueError(
                f"{_WHERE}: `max_per_rank` must allow the last batch of an epoch, which with `tail`='merge' has {last} "
                f"samples; got bounds that sum to {sum(hi)}. Raise them, or give the loader `tail='keep'`."
            )
