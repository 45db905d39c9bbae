"""The number of optimizer steps of a run, counted from where it is now.

A run is one `fit`, or several that resume each other. Lightning's own estimate counts from the first epoch of the
Trainer, with the present accumulation, and under manual optimization it does not count a single optimizer's steps.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm.lightning_internals import place_in_run, training_loaders

_TRUSTED = ("torch", "lightning", "pytorch_lightning", "lightning_comm")  # loaders and samplers keep their length


def steps_to_come(trainer: Trainer) -> int | None:
    """Return how many optimizer steps are still to be taken, or ``None`` where that cannot be known before.

    It is the same on all ranks with the same number of batches. Under manual optimization the user's code decides how
    often to step. An early stop, and steps that the module leaves out, cannot be known.

    Args:
        trainer: When training starts, or later.

    """
    if not trainer.lightning_module.automatic_optimization:
        return None
    limits = [] if trainer.max_steps == -1 else [max(0, trainer.max_steps - trainer.global_step)]
    in_epochs = _steps_in_epochs(trainer)
    if in_epochs is not None:
        limits.append(in_epochs)
    return min(limits, default=None)


def total_steps(trainer: Trainer, steps_done: int = 0) -> int | None:
    """Return how many optimizer steps the run has, or ``None`` where that cannot be known before.

    Args:
        trainer: When training starts.
        steps_done: Those of the run that is resumed.

    """
    rest = steps_to_come(trainer)
    return steps_done + rest if rest is not None and steps_done + rest > 0 else None


class Batch(NamedTuple):
    """A batch to come.

    Args:
        epoch: Its epoch, from 0.
        number: Its number in the epoch, from 1.
        steps: Optimizer steps taken once it is over, of those to come.
        ends_step: Whether it ends in an optimizer step.
        ends_epoch: Whether it is the last of its epoch.

    """

    epoch: int
    number: int
    steps: int
    ends_step: bool
    ends_epoch: bool


class Stretch(NamedTuple):
    """The batches to come of one epoch, up to its end or that of the run.

    Args:
        epoch: The epoch, from 0.
        begin: Batches of it that are done.
        end: The number of its last batch to come, from 1.
        batches: How many the whole epoch has; infinity where that is not known.
        accumulate: Batches in an optimizer step.
        steps: Optimizer steps taken before, of those to come.

    """

    epoch: int
    begin: int
    end: int
    batches: float
    accumulate: int
    steps: int

    @property
    def ends_epoch(self) -> bool:
        """Whether the epoch ends with it."""
        return self.end == self.batches

    def batch(self, number: int) -> Batch:
        """Return a batch by its number in the epoch."""
        last = number == self.batches
        incomplete = last and number % self.accumulate > 0
        steps = self.steps + number // self.accumulate - self.begin // self.accumulate + incomplete
        return Batch(self.epoch, number, steps, incomplete or number % self.accumulate == 0, last)

    def stepping(self) -> Iterator[int]:
        """Yield the numbers of the batches that end in an optimizer step."""
        yield from range((self.begin // self.accumulate + 1) * self.accumulate, self.end + 1, self.accumulate)
        if self.ends_epoch and self.end % self.accumulate:
            yield self.end


def stretches_to_come(trainer: Trainer, steps: int) -> Iterator[Stretch]:
    """Yield the batches of the next optimizer steps, epoch by epoch, under automatic optimization.

    Args:
        trainer: When training starts.
        steps: How many steps.

    """
    epoch, begin = place_in_run(trainer)
    batches, taken = trainer.num_training_batches, 0
    if begin >= batches:
        begin, epoch = 0, epoch + 1
    while taken < steps and batches > 0:
        every = accumulation(trainer, epoch)
        enough = (begin // every + steps - taken) * every
        stretch = Stretch(epoch, begin, int(min(batches, enough)), batches, every, taken)
        yield stretch
        taken = stretch.batch(stretch.end).steps
        begin, epoch = 0, epoch + 1


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Return how many batches make an optimizer step in an epoch."""
    schedulers = _accumulation_schedulers(trainer)
    if not schedulers:
        return trainer.accumulate_grad_batches
    return schedulers[-1].get_accumulate_grad_batches(epoch)  # each sets the Trainer's number as an epoch begins


def _accumulation_schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    return [each for each in getattr(trainer, "callbacks", []) if isinstance(each, GradientAccumulationScheduler)]


def restore_accumulation(trainer: Trainer) -> None:
    """Restore the accumulation of an epoch that is resumed in its middle: its scheduler sets it only at the start."""
    epoch, batches_done = place_in_run(trainer)
    if batches_done:
        trainer.accumulate_grad_batches = accumulation(trainer, epoch)


def may_differ(trainer: Trainer) -> bool:
    """Whether ranks may differ in batches or steps, though all have announced the same number of batches.

    The length of an epoch is certain where torch's own loader and sampler, or ours, go through a data set that has one.
    Iterable data, and a loader or sampler of the user's, may end before the length that they announce. With an
    `optimizer_step` of its own, or under manual optimization, the module decides how often it steps.
    """
    module = trainer.lightning_module
    own_steps = is_overridden("optimizer_step", module) or not module.automatic_optimization
    return own_steps or not all(map(_ends_when_it_says, training_loaders(trainer)))


def _ends_when_it_says(loader: object) -> bool:
    parts = [loader]
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset):
            return False
        parts += [each for each in (loader.sampler, loader.batch_sampler) if each is not None]
    return all(type(each).__module__.partition(".")[0] in _TRUSTED for each in parts)


def _steps_in_epochs(trainer: Trainer) -> int | None:
    batches, last = trainer.num_training_batches, trainer.max_epochs
    if not math.isfinite(batches) or last is None or last < 0:
        return None
    epoch, batches_done = place_in_run(trainer)
    in_epoch = partial(_steps_in_epoch, trainer, int(batches))
    if epoch >= last:
        return 0
    rest = max(0, in_epoch(epoch) - batches_done // accumulation(trainer, epoch)) if batches_done < batches else 0
    if not _accumulation_schedulers(trainer):
        return rest + (last - epoch - 1) * in_epoch(epoch)
    return rest + sum(map(in_epoch, range(epoch + 1, last)))


def _steps_in_epoch(trainer: Trainer, batches: int, epoch: int) -> int:
    return math.ceil(batches / accumulation(trainer, epoch))
