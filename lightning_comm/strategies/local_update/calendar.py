"""Validations and checkpoints that will fall into the middle of a round, counted before the run."""

from collections.abc import Container, Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_comm.lightning_internals import SavePlan, save_plan
from lightning_comm.strategies.common.run_length import Batch, Stretch, stretches_to_come
from lightning_comm.strategies.local_update.run import LocalUpdateRun

_MOST_EVENTS = 200_000  # about a second


class TooLong(Exception):
    """The error of a run with too many validations and checkpoints to look at each in advance."""


def averages_in_mid_round(
    trainer: Trainer, run: LocalUpdateRun, steps: int, apart_from: int, ends: Container[int] | None, *, sure: bool
) -> tuple[int, int]:
    """Return how often ranks will be averaged for validations, and at most for checkpoints, in mid-round.

    Args:
        trainer: When training starts.
        run: Its rounds.
        steps: Optimizer steps to come.
        apart_from: After how many steps ranks train apart.
        ends: After which steps ranks synchronise, or ``None`` where that is uncertain: then all are counted.
        sure: Whether the run certainly takes this many steps, and so is averaged after the last of them.

    Raises:
        TooLong: If there are too many to look at each.

    """
    always = run.settings.averaging.method is not None
    averaged = run.settings.evaluate_weights == "average"
    plans, done, evaluations, checkpoints = _save_plans(trainer), run.clock.steps_done, 0, 0
    for batch in _batches_to_look_at(trainer, plans, steps):
        at = done + batch.steps
        equal = batch.ends_step and not always and ends is not None and at in ends
        before = at < apart_from or (at == apart_from and batch.ends_step)
        if before or equal or (sure and at == done + steps):
            continue
        validates = _validates(trainer, batch)
        evaluations += validates and averaged
        shown = validates and averaged  # then the average is still in place for a checkpoint after a validation
        checkpoints += sum(
            plan.files for plan in plans if _saves(plan, batch, trainer.global_step + batch.steps, validates, shown)
        )
    return evaluations, checkpoints


def not_foreseen(trainer: Trainer, run: LocalUpdateRun) -> list[str]:
    """Return a text of what else may average ranks in mid-round and cannot be counted in advance."""
    averaged = trainer.enable_validation and run.settings.evaluate_weights == "average"
    savers = [each for each in getattr(trainer, "callbacks", []) if isinstance(each, Checkpoint)]
    plans, said = _save_plans(trainer), []
    by_clock = [
        *(["validations"] if averaged and trainer.val_check_batch is None else []),
        *(["checkpoints"] if any(plan.by_the_clock and plan.files for plan in plans) else []),
    ]
    if by_clock:
        said.append(f"averages for {' and '.join(by_clock)} by the clock")
    if trainer.num_training_batches == float("inf"):
        validates = averaged and trainer.val_check_batch == float("inf")
        if validates or any(plan.every_n_epochs and plan.files for plan in plans):
            said.append("averages at the ends of epochs, whose length is not known")
    own = sorted({type(each).__name__ for each in savers if type(each) is not ModelCheckpoint})
    return said + ([f"averages for checkpoints of {' and '.join(own)}"] if own else [])


def _save_plans(trainer: Trainer) -> list[SavePlan]:
    callbacks = getattr(trainer, "callbacks", [])
    return [save_plan(each, trainer) for each in callbacks if type(each) is ModelCheckpoint]


def _batches_to_look_at(trainer: Trainer, plans: list[SavePlan], steps: int) -> Iterator[Batch]:
    """Yield the batches after which there may be a validation or a checkpoint, in their order."""
    plans = [plan for plan in plans if plan.files and not plan.by_the_clock]
    if not plans and _validation_every(trainer) is None:
        return
    seen = 0
    for stretch in stretches_to_come(trainer, steps):
        ranges = [_validations(trainer, stretch), *(_saved_steps(plan, stretch, trainer.global_step) for plan in plans)]
        seen += 1 + sum(map(len, ranges))
        if seen > _MOST_EVENTS:
            raise TooLong
        numbers = {number for each in ranges for number in each} | ({stretch.end} if stretch.ends_epoch else set())
        yield from map(stretch.batch, sorted(numbers))


def _validation_every(trainer: Trainer) -> int | None:
    """Return after how many batches validation runs, or ``None`` where it does not run by batches."""
    every = trainer.val_check_batch
    return None if not trainer.enable_validation or every is None or every == float("inf") else int(every)


def _validations(trainer: Trainer, stretch: Stretch) -> range:
    """Return the numbers of the batches after which validation may run."""
    every = _validation_every(trainer)
    if every is None:
        return range(0)
    done = _batches_before(trainer, stretch.epoch) + stretch.begin
    return range(stretch.begin + every - done % every, stretch.end + 1, every)


def _saved_steps(plan: SavePlan, stretch: Stretch, steps_before: int) -> range | list[int]:
    """Return the numbers of the batches after which a checkpoint is saved because of its step."""
    if not plan.every_n_steps:
        return range(0)
    first = steps_before + stretch.steps
    last = steps_before + stretch.batch(stretch.end).steps
    wanted = range(first + plan.every_n_steps - first % plan.every_n_steps, last + 1, plan.every_n_steps)
    if len(wanted) > _MOST_EVENTS:
        raise TooLong
    begun = stretch.begin // stretch.accumulate
    return [min(stretch.end, (begun + step - first) * stretch.accumulate) for step in wanted]


def _batches_before(trainer: Trainer, epoch: int) -> int:
    """Return how many batches the count of those between validations holds when an epoch begins."""
    if trainer.check_val_every_n_epoch is not None or trainer.num_training_batches == float("inf"):
        return 0
    return epoch * int(trainer.num_training_batches)


def _validates(trainer: Trainer, batch: Batch) -> bool:
    every, epochs = _validation_every(trainer), trainer.check_val_every_n_epoch
    if every is None or (epochs is not None and (batch.epoch + 1) % epochs):
        return False
    return (_batches_before(trainer, batch.epoch) + batch.number) % every == 0


def _saves(plan: SavePlan, batch: Batch, step: int, validates: bool, shown: bool) -> bool:
    if plan.every_n_steps:
        return batch.ends_step and step % plan.every_n_steps == 0
    if not plan.every_n_epochs or (batch.epoch + 1) % plan.every_n_epochs:
        return False
    return batch.ends_epoch if plan.at_epoch_end else validates and not shown
