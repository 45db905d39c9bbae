"""One line at the start of a run of local updates: how often ranks will synchronise, and what that sends."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_comm.core.ledger import wire_bytes
from lightning_comm.core.local_update import FixedPeriod, ends_to_come
from lightning_comm.core.local_update_traffic import LocalUpdateTraffic
from lightning_comm.lightning_internals import SavePlan, save_plan
from lightning_comm.planning.report import data_size, percent
from lightning_comm.strategies.compression_line import all_reduced_bytes, compressed_bytes
from lightning_comm.strategies.local_update_run import LocalUpdateRun
from lightning_comm.strategies.planned_rates import ScheduleUnknown, planned_rates
from lightning_comm.strategies.run_length import Batch, batches_to_come

_MOST_STEPS = 2_000_000  # to look ahead; of longer runs the line says what one synchronisation costs


def plan_of(trainer: Trainer, run: LocalUpdateRun) -> str:
    """Return the line of a run of local updates; when training starts."""
    ranks, averages = run.recorder.world_size, run.replica.averaged()
    with_ema = ", moving averages of the weights included" if "weight_averages" in averages else ""
    costs = _costs(run)
    if not _is_foreseen(run):
        return (
            f"the length of the run is not known before. A synchronisation, {_period(run)}, sends "
            f"{data_size(costs.sync_bytes)} from each of {ranks} ranks{with_ema}, and an average for a validation or a "
            f"checkpoint in mid-round {data_size(costs.average_bytes)}; DDP sends {data_size(costs.gradient_bytes)} a "
            "step."
        )
    traffic, exact = traffic_to_come(trainer, run)
    first, saves = traffic.gradient_steps, traffic.checkpoints
    alone = "average" if first > 1 else "averages"
    return (
        f"{_count(first + traffic.steps, 'optimizer step')} on {ranks} ranks: "
        + (f"{first:,} that {alone} gradients, as under DDP, then " if first else "")
        + f"{'' if exact else 'at most '}{_count(traffic.synchronisations, 'synchronisation')}, "
        f"{_count(traffic.evaluations, 'average')} for validations and {'at most ' if saves else ''}{saves:,} for "
        f"checkpoints in mid-round; {'at most ' if saves or not exact else ''}{data_size(traffic.wire_bytes)} sent by "
        f"each rank{with_ema}, {percent(traffic.wire_bytes / traffic.ddp_bytes) if traffic.ddp_bytes else 'none'} of "
        f"the {data_size(traffic.ddp_bytes)} under DDP."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def traffic_to_come(trainer: Trainer, run: LocalUpdateRun) -> tuple[LocalUpdateTraffic, bool]:
    """Return what is going to be sent, and whether rounds end as it says; otherwise they end no sooner.

    How often ranks synchronise follows from the period rule and from the learning rates to come, which copies of the
    schedulers tell. Of checkpoints there may be fewer, where they are chosen by a metric. Not counted: what ranks tell
    each other about the rounds, buffers of whole numbers, and optimizer state, where that is averaged.

    Args:
        trainer: When training starts; the length of its run must be known.
        run: Its rounds.

    """
    total, done = run.clock.total_steps, run.clock.steps_done
    assert total is not None
    gradient_steps = min(total - done, max(0, run.gradient_steps - done))
    ends, exact = _round_ends(trainer, run, total - done - gradient_steps, gradient_steps)
    evaluations, checkpoints = _in_mid_round(trainer, run, total - done, done + gradient_steps, ends)
    traffic = replace(
        _costs(run),
        gradient_steps=gradient_steps,
        steps=total - done - gradient_steps,
        synchronisations=len(ends),
        evaluations=evaluations,
        checkpoints=checkpoints,
    )
    return traffic, exact


def _is_foreseen(run: LocalUpdateRun) -> bool:
    return run.clock.total_steps is not None and run.clock.total_steps - run.clock.steps_done <= _MOST_STEPS


def _costs(run: LocalUpdateRun) -> LocalUpdateTraffic:
    groups, ranks = run.replica.averaged(), run.recorder.world_size
    average_bytes = sum(wire_bytes("all_reduce", _averaged_bytes(each.values()), ranks) for each in groups.values())
    return LocalUpdateTraffic(
        gradient_bytes=_gradient_bytes(run),
        sync_bytes=_sync_bytes(run, groups["parameters"], average_bytes),
        average_bytes=average_bytes,
    )


def _gradient_bytes(run: LocalUpdateRun) -> int:
    """Return what DDP sends in a step: gradients, and buffers before the forward."""
    buffers = sum(each.numel() * each.element_size() for each in run.module.buffers())
    ranks = run.recorder.world_size
    return all_reduced_bytes(run.module, ranks) + wire_bytes("broadcast", buffers, ranks)


def _averaged_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what an average hands over: numbers of less than 32 bits are averaged as such of 32."""
    return sum(each.numel() * max(4, each.element_size()) for each in tensors)


def _sync_bytes(run: LocalUpdateRun, parameters: Mapping[str, Tensor], average_bytes: int) -> int:
    method, ranks = run.settings.averaging.method, run.recorder.world_size
    if method is None:
        return average_bytes
    in_full = wire_bytes("all_reduce", _averaged_bytes(parameters.values()), ranks)
    itemsize = max((max(4, each.element_size()) for each in parameters.values()), default=4)
    sent = compressed_bytes(method, [tuple(each.shape) for each in parameters.values()], ranks, itemsize)
    return average_bytes - in_full + (in_full if sent is None else sent)


def _period(run: LocalUpdateRun) -> str:
    rule = run.settings.period
    if isinstance(rule, FixedPeriod):
        return f"every {rule.steps} steps" if rule.steps > 1 else "every step"
    least = getattr(rule, "h_base", None)
    return f"every {least} steps or more" if least is not None else f"as often as {type(rule).__name__} says"


def _round_ends(trainer: Trainer, run: LocalUpdateRun, steps: int, gradient_steps: int) -> tuple[tuple[int, ...], bool]:
    """Return after which steps ranks synchronise, and whether that is sure; otherwise it is as often as can be."""
    clock = run.clock.copy()
    clock.steps_done += gradient_steps
    module, counted = trainer.lightning_module, run.settings.counted_optimizer
    try:
        if isinstance(run.settings.period, FixedPeriod):
            return ends_to_come(clock, [0.0] * steps), True
        rates = planned_rates(trainer, module, counted, gradient_steps + steps)
        return ends_to_come(clock, rates[gradient_steps:]), True
    except (ScheduleUnknown, ValueError):  # a rate that the rule refuses is refused when its round begins
        clock.rule = FixedPeriod(getattr(run.settings.period, "h_base", 1))
        return ends_to_come(clock, [0.0] * steps), False


def _in_mid_round(
    trainer: Trainer, run: LocalUpdateRun, steps: int, apart_from: int, ends: Collection[int]
) -> tuple[int, int]:
    """Return how often ranks have to be averaged for validations, and at most for checkpoints, in mid-round."""
    always = run.settings.averaging.method is not None
    averaged = run.settings.evaluate_weights == "average"
    plans = [
        save_plan(each, trainer) for each in getattr(trainer, "callbacks", []) if isinstance(each, ModelCheckpoint)
    ]
    ends, done, evaluations, checkpoints = set(ends), run.clock.steps_done, 0, 0
    for batch in batches_to_come(trainer, steps):
        at = done + batch.steps
        if at <= apart_from or not (always or not batch.ends_step or at not in ends) or at == done + steps:
            continue
        validates = _validates(trainer, batch)
        evaluations += validates and averaged
        shown = validates and averaged  # then the average is in place for what is saved behind a validation
        checkpoints += sum(
            plan.files for plan in plans if _saves(plan, batch, trainer.global_step + batch.steps, validates, shown)
        )
    return evaluations, checkpoints


def _validates(trainer: Trainer, batch: Batch) -> bool:
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    if epochs is None:
        return bool((batch.epoch * trainer.num_training_batches + batch.number) % every == 0)
    return bool((batch.epoch + 1) % epochs == 0 and batch.number % every == 0)


def _saves(plan: SavePlan, batch: Batch, step: int, validates: bool, shown: bool) -> bool:
    if plan.every_n_steps:
        return batch.ends_step and step % plan.every_n_steps == 0
    if not plan.every_n_epochs or (batch.epoch + 1) % plan.every_n_epochs:
        return False
    return batch.ends_epoch if plan.at_epoch_end else validates and not shown
