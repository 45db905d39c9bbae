"""One line at the start of a run of local updates: how often ranks will synchronise, and what that sends.

First the forecast, then a short clause with its assumptions and what it does not count.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, Timer
from torch import Tensor

from lightning_comm.core.ledger import wire_bytes
from lightning_comm.core.local_update.clock import ends_of_equal_rounds, ends_to_come
from lightning_comm.core.local_update.periods import FixedPeriod
from lightning_comm.core.local_update.traffic import LocalUpdateTraffic
from lightning_comm.core.quantities import data_size, percent
from lightning_comm.strategies.common.planned_rates import ScheduleUnknown, planned_rates
from lightning_comm.strategies.common.run_length import may_differ
from lightning_comm.strategies.common.sent_bytes import all_reduced_bytes, compressed_bytes
from lightning_comm.strategies.local_update.calendar import TooLong, averages_in_mid_round, not_foreseen
from lightning_comm.strategies.local_update.period_setup import shortest_period
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.transport.compression.sparse_mask import SparseMask


class _Rounds(NamedTuple):
    """The steps at which rounds will end; if that is uncertain, why, and the steps are the most that there can be."""

    ends: Collection[int]
    unsure: str | None


class Foresight(NamedTuple):
    """The forecast of what will be sent, and how certain it is; where it is not, it is the most that there can be.

    Args:
        traffic: Averages and bytes.
        sure_of_steps: Whether the run takes this many steps, unless it is stopped.
        unsure: Why it is uncertain where rounds end, or ``None``.

    """

    traffic: LocalUpdateTraffic
    sure_of_steps: bool
    unsure: str | None

    @property
    def exact(self) -> bool:
        """Whether rounds certainly end as forecast."""
        return self.sure_of_steps and self.unsure is None


def plan_of(trainer: Trainer, run: LocalUpdateRun) -> str:
    """Return the line of a run of local updates; when training starts.

    A run never fails by it: if a callback or a rule of the user's own raises an unexpected error, the line reports it.
    """
    try:
        return _line(trainer, run)
    except Exception as error:
        return f"what the run will send cannot be foreseen ({type(error).__name__}: {error})."


def _line(trainer: Trainer, run: LocalUpdateRun) -> str:
    if run.clock.total_steps is None:
        return _line_of_one_average(trainer, run, "the length of the run is not known before")
    try:
        foreseen = traffic_to_come(trainer, run)
    except TooLong:
        left = run.clock.total_steps - run.clock.steps_done
        return _line_of_one_average(trainer, run, f"the run of {left:,} steps is too long to look ahead")
    traffic, sure, _ = foreseen
    first, saves, at_most = traffic.gradient_steps, traffic.checkpoints, "" if foreseen.exact else "at most "
    bytes_at_most = "at most " if saves or not foreseen.exact or _may_send_less(run) else ""
    return (
        f"{'' if sure else 'at most '}{_number(first + traffic.steps, 'optimizer step')} on "
        f"{run.recorder.members.size} ranks: "
        + (f"{first:,} that average gradients, as under DDP, then " if first else "")
        + f"{at_most}{_number(traffic.synchronisations, 'synchronisation')}, "
        f"{at_most if traffic.evaluations else ''}{_number(traffic.evaluations, 'average')} for validations and "
        f"{'at most ' if saves else ''}{saves:,} for checkpoints in mid-round; "
        f"{bytes_at_most}{data_size(traffic.wire_bytes)} sent by each rank{_with_averages(run)}, "
        f"{_against_ddp(traffic, sure=sure)}{_clause(_conditions(run, foreseen), *_reservations(trainer, run))}."
    )


def _line_of_one_average(trainer: Trainer, run: LocalUpdateRun, why: str) -> str:
    costs = _costs(run)
    return (
        f"{why}. A synchronisation, {_period(run)}, sends {data_size(costs.sync_bytes)} from each of "
        f"{run.recorder.members.size} ranks{_with_averages(run)}, and an average for a validation or a checkpoint in "
        f"mid-round {data_size(costs.average_bytes)}; DDP sends {data_size(costs.gradient_bytes)} a step"
        f"{_clause(*_reservations(trainer, run))}."
    )


def traffic_to_come(trainer: Trainer, run: LocalUpdateRun) -> Foresight:
    """Return the forecast of what will be sent, as far as that is known in advance.

    How often ranks synchronise follows from the period rule and the learning rates to come, which are computed with
    copies of the schedulers. There may be fewer checkpoints, where a metric decides. Not counted: rank status, messages
    about masks, buffers of whole numbers, and optimizer state, where that is averaged.

    Args:
        trainer: When training starts; the length of its run must be known.
        run: Its rounds.

    Raises:
        TooLong: If the run has too many validations and checkpoints to look at each.

    """
    total, done = run.clock.total_steps, run.clock.steps_done
    assert total is not None
    gradient_steps = min(total - done, max(0, run.gradient_steps - done))
    rounds, sure = _rounds(trainer, run, total - done - gradient_steps, gradient_steps), not may_differ(trainer)
    ends = rounds.ends if sure and rounds.unsure is None else None
    evaluations, checkpoints = averages_in_mid_round(trainer, run, total - done, done + gradient_steps, ends, sure=sure)
    traffic = replace(
        _costs(run),
        gradient_steps=gradient_steps,
        steps=total - done - gradient_steps,
        synchronisations=len(rounds.ends),
        evaluations=evaluations,
        checkpoints=checkpoints,
    )
    return Foresight(traffic, sure, rounds.unsure)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _with_averages(run: LocalUpdateRun) -> str:
    return ", moving averages of the weights included" if "weight_averages" in run.model.tensors.averaged() else ""


def _against_ddp(traffic: LocalUpdateTraffic, *, sure: bool) -> str:
    ddp = data_size(traffic.ddp_bytes)
    if not sure:  # a share of what this many steps send would be no bound: fewer steps have other rounds
        return f"where as many steps under DDP send {ddp}"
    share = percent(traffic.wire_bytes / traffic.ddp_bytes) if traffic.ddp_bytes else "none"
    return f"{share} of the {ddp} under DDP"


def _clause(*said: str) -> str:
    said = tuple(each for each in said if each)
    return f"; {', '.join(said)}" if said else ""


def _conditions(run: LocalUpdateRun, foreseen: Foresight) -> str:
    """Return the assumptions about the number of rounds, where the period follows the learning rate."""
    if type(run.settings.period) is FixedPeriod or foreseen.traffic.steps == 0:
        return ""
    if foreseen.unsure is None:
        return "as long as only the schedulers change the learning rate"
    return f"rounds may be longer, since {foreseen.unsure}"


def _reservations(trainer: Trainer, run: LocalUpdateRun) -> list[str]:
    """Return the other assumptions of the line, and what it does not count."""
    callbacks, method, said = getattr(trainer, "callbacks", []), run.settings.averaging.method, []
    stops = ["`max_time`"] if any(isinstance(each, Timer) for each in callbacks) else []
    stops += ["EarlyStopping"] if any(isinstance(each, EarlyStopping) for each in callbacks) else []
    if stops and run.clock.total_steps is not None:
        said.append(f"unless {' or '.join(stops)} ends the run before")
    unfreezes = any(isinstance(each, BaseFinetuning) for each in callbacks)
    if unfreezes or not all(each.requires_grad for each in run.module.parameters()):
        said.append("with the parameters that are trained now")
    if isinstance(method, SparseMask):
        said.append("as if nothing were pruned, and without the masks")
    elif _may_send_less(run):
        said.append(f"as if {type(method).__name__} sent all in full")
    if run.settings.optimizer_state == "average":
        said.append("without the optimizer state, which is averaged too")
    if run.clock.total_steps is not None:
        said += [f"besides {each}" for each in not_foreseen(trainer, run)]
    return said


def _costs(run: LocalUpdateRun) -> LocalUpdateTraffic:
    groups, ranks = run.model.tensors.averaged(), run.recorder.members.size
    average_bytes = sum(wire_bytes("all_reduce", _averaged_bytes(each.values()), ranks) for each in groups.values())
    return LocalUpdateTraffic(
        gradient_bytes=_gradient_bytes(run),
        sync_bytes=_sync_bytes(run, groups["parameters"], average_bytes),
        average_bytes=average_bytes,
    )


def _gradient_bytes(run: LocalUpdateRun) -> int:
    """Return what DDP sends in a step: gradients, and buffers before the forward."""
    buffers = sum(each.numel() * each.element_size() for each in run.module.buffers())
    ranks = run.recorder.members.size
    return all_reduced_bytes(run.module, ranks) + wire_bytes("broadcast", buffers, ranks)


def _averaged_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the payload of an average: numbers of less than 32 bits are averaged in 32 bits."""
    return sum(each.numel() * max(4, each.element_size()) for each in tensors)


def _sync_bytes(run: LocalUpdateRun, parameters: Mapping[str, Tensor], average_bytes: int) -> int:
    if run.settings.averaging.method is None:
        return average_bytes
    in_full = wire_bytes("all_reduce", _averaged_bytes(parameters.values()), run.recorder.members.size)
    sent = _compressed_bytes(run, parameters)
    return average_bytes - in_full + (in_full if sent is None else sent)


def _compressed_bytes(run: LocalUpdateRun, parameters: Mapping[str, Tensor]) -> int | None:
    method = run.settings.averaging.method
    itemsize = max((max(4, each.element_size()) for each in parameters.values()), default=4)
    shapes = [tuple(each.shape) for each in parameters.values()]
    return None if method is None else compressed_bytes(method, shapes, run.recorder.members.size, itemsize)


def _may_send_less(run: LocalUpdateRun) -> bool:
    """Whether the compression may send less than is known in advance: a mask, or one of the user's own."""
    method = run.settings.averaging.method
    unknown = method is not None and _compressed_bytes(run, run.model.tensors.averaged()["parameters"]) is None
    return unknown or isinstance(method, SparseMask)


def _period(run: LocalUpdateRun) -> str:
    rule = run.settings.period
    least = shortest_period(rule)
    if least is None:
        return f"as often as {type(rule).__name__} says"
    steps = "step" if least == 1 else f"{least} steps"
    return f"every {steps}{'' if isinstance(rule, FixedPeriod) else ' or more'}"


def _rounds(trainer: Trainer, run: LocalUpdateRun, steps: int, gradient_steps: int) -> _Rounds:
    """Return after which steps ranks synchronise; where that is uncertain, the most often that there can be."""
    clock, rule = run.clock.copy(), run.settings.period
    clock.steps_done += gradient_steps
    shortest = shortest_period(rule)
    if type(rule) is FixedPeriod:
        return _Rounds(ends_of_equal_rounds(clock, rule.steps, steps), None)
    try:
        if shortest is None:  # it may have state, or side effects, and is not called
            raise ScheduleUnknown(f"only {type(rule).__name__} itself knows them")
        module, counted = trainer.lightning_module, run.settings.counted_optimizer
        rates = planned_rates(trainer, module, counted, gradient_steps + steps)
        return _Rounds(ends_to_come(clock, rates[gradient_steps:]), None)
    except (ScheduleUnknown, ValueError) as unknown:  # a rate that the rule refuses is refused when its round begins
        return _Rounds(ends_of_equal_rounds(clock, shortest or 1, steps), str(unknown))
