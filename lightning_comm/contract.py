"""Protocols by which callbacks, the pilot and strategies talk.

A callback asks ``isinstance(trainer.strategy, SamplesWeighed)`` and then calls the methods of the protocol. Unlike with
names in strings, mypy sees each use, and a renamed method breaks the build. Which strategy implements which protocol is
listed in :mod:`lightning_comm.strategies.registration`. Strategies and callbacks never import each other; both import
this file.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update import PeriodRule
from lightning_comm.errors import refuse
from lightning_comm.transport.compression.base import Compression


@runtime_checkable
class MessagesRecorded(Protocol):
    """A strategy or callback that records every message of its own."""

    @property
    def ledger(self) -> CommLedger:
        """Every message that this rank has sent in the last or current ``fit``."""


@runtime_checkable
class TakesRefusals(Protocol):
    """A strategy that raises one error for its own problems and those that callbacks have found."""

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Add the problems that a callback found in its ``setup``, which runs before the strategy's."""


def refuse_with_strategy(trainer: Trainer, where: str, problems: Iterable[str]) -> None:
    """Hand a callback's problems to the strategy, which raises them with its own; under other strategies raise here.

    Raises:
        RefusedSetUp: If there are problems, and the strategy is not one of this package.

    """
    strategy: object = trainer.strategy
    if isinstance(strategy, TakesRefusals):
        strategy.refuse_in_set_up(where, problems)
    else:
        refuse(where, problems)


@runtime_checkable
class SamplesWeighed(Protocol):
    """A strategy whose averages of parameters can weight each rank by the samples that it has trained on."""

    def weigh_by_samples(self) -> None:
        """Weight each rank by its share of the samples of a round; call it in ``setup`` for ``fit``, on all ranks."""

    def count_samples(self, samples: int) -> None:
        """Count the samples of the batch that has begun; 0 for one that only keeps this rank in step."""


@runtime_checkable
class GradientsAnnounced(Protocol):
    """A strategy that announces when this rank's gradients are ready, before it waits for those of others."""

    def when_gradients_are_ready(self, call: Callable[[float], None]) -> None:
        """Call a function after each backward, with the seconds of it that were spent on messages.

        From ``on_train_start`` on, until the fit ends.
        """


@runtime_checkable
class GradientsCompressed(Protocol):
    """A strategy that averages gradients at every step, as far as its compression sends them."""

    @property
    def compression(self) -> Compression:
        """What is sent of the gradients, and how."""


@runtime_checkable
class AveragesTakenOut(Protocol):
    """A strategy that puts averaged weights in place for a validation, and restores each rank's own after it."""

    def take_into_average(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, which a validation has renewed, as part of the average, which is removed after it."""


class RoundRule(NamedTuple):
    """The rule by which the rounds of a run are planned, once the run is known.

    Args:
        period: The rule, with every coefficient resolved.
        warmup_steps: Steps of a rising learning rate, as for
            :class:`~lightning_comm.core.local_update.RoundClock`.

    """

    period: PeriodRule
    warmup_steps: int | Literal["auto"]


class RoundInForce(NamedTuple):
    """The round that a rank is in.

    Args:
        steps: Its length in optimizer steps; 0 between two rounds, and while gradients are averaged.
        total_steps: Optimizer steps of the whole run; ``None`` where that is not known.

    """

    steps: int
    total_steps: int | None


@runtime_checkable
class SynchronisesInRounds(Protocol):
    """A strategy whose ranks train apart for a round of several steps, and then synchronise.

    Its properties can be read at any time, also outside of a ``fit``: ``isinstance`` reads them.
    """

    @property
    def averages_gradients(self) -> bool:
        """Whether gradients are averaged at every step now; before training starts, whether they are at first."""

    @property
    def rounds_done(self) -> int:
        """How often ranks have synchronised in this ``fit``; up to date when callbacks see the end of a batch."""

    @property
    def averages_landed(self) -> int:
        """How many averages are in the weights in this ``fit``; less than ``rounds_done`` while one is in flight."""

    @property
    def round_in_force(self) -> RoundInForce:
        """The round that this rank is in."""

    @property
    def round_rule(self) -> RoundRule:
        """The rule by which its rounds are planned; from ``on_train_start`` on."""

    @property
    def gradient_phase_steps(self) -> int:
        """Optimizer steps at the start of the run at which gradients are averaged; 0 before training starts."""

    def shorten_gradient_phase(self, steps: int) -> None:
        """Let rounds begin after this many steps of the run, if that is sooner.

        For trials of a few steps, on all ranks alike; from the first batch on, before its step.
        """
