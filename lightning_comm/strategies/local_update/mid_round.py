"""Averaged weights in the middle of a round, for a validation or a checkpoint, and each rank's own after it."""

from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_comm.ondevice.optimizer.state import saved_tensors
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.local_update.meeting import Meeting, Parts
from lightning_comm.strategies.local_update.rounds import Rounds
from lightning_comm.transport.temporary_average import TemporaryAverage


class MidRoundAverage:
    """The temporary average of ranks that train apart, to evaluate and save.

    Args:
        parts: The parts of the run.
        meeting: Where ranks meet.
        rounds: Knows whether they are apart.
        compare_places: Compares where ranks are, before messages that would not show it.
        averages_state: Whether the state of optimizers is averaged too.

    Attributes:
        weights: The average that is in place, and each rank's own values.

    """

    def __init__(
        self,
        parts: Parts,
        meeting: Meeting,
        rounds: Rounds,
        compare_places: Callable[[str], None],
        *,
        averages_state: bool,
    ) -> None:
        self.weights = TemporaryAverage(parts.model, parts.overlapped)
        self._model = parts.model
        self._agreement = parts.agreement
        self._meeting = meeting
        self._rounds = rounds
        self._compare_places = compare_places
        self._averages_state = averages_state

    def enter_evaluation(self) -> None:
        """Put averaged weights in place for an evaluation, after checking that all ranks are here for it."""
        self.leave_checkpoint()
        if not self._rounds.apart:
            return
        with self._agreement.first_error_shown():
            rows = self._meeting.meet()
            if self._rounds.stopped_apart:
                self._model.agree_on_moved()
            else:
                self._meeting.check(rows)
            self.weights.enter("evaluation", self._meeting.weight(rows), rank_status.moderate(rows))

    def enter_checkpoint(self) -> None:
        """Put averaged weights in place for a checkpoint, unless they are in place already."""
        self._compare_places("a checkpoint")
        if not self._rounds.apart or self.weights.purpose is not None:
            return
        with self._agreement.first_error_shown():
            # only rank 0's weights are saved
            self.weights.enter("checkpoint", self._meeting.exchange_weight(), broadcast=False)

    def leave_checkpoint(self) -> None:
        """Restore each rank's own weights, if an average is in place for a checkpoint."""
        if self.weights.purpose == "checkpoint":
            self.weights.leave()

    def average_optimizer_states(self, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return averaged copies of the optimizers' states, if they are averaged and averaged weights are in place.

        Note:
            *Memory.* A second copy of the states.

        """
        if not self._averages_state or not self._rounds.apart or self.weights.purpose is None:
            return states
        copies = apply_to_collection(states, Tensor, lambda tensor: tensor.detach().clone())
        alike = self.weights.average_copies(saved_tensors(copies))
        return copies if alike else states
