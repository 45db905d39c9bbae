"""Weights of ranks in an average: the share of each in the samples that all ranks trained on in the round."""

from collections.abc import Callable
from typing import Any

import torch

from lightning_comm.core.arguments import is_whole
from lightning_comm.ondevice.share import Share
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.transport.members import Members
from lightning_comm.transport.recording import Pending, Recorder


class SampleWeights:
    """Counts the samples of this rank since the last synchronisation, and knows its weight once all counts are known.

    Without :meth:`begin` averages are equal, and no count is sent or saved.

    Note:
        *Communication.* Counts are sent in the rank status of meetings, as one more number; where an average has no
        meeting before it, :meth:`exchange` sends them.

    Example:
        >>> weights = SampleWeights()
        >>> weights.begin()
        >>> weights.count(6)
        >>> weights.end_batch()
        >>> weights.sent
        6.0

    """

    def __init__(self) -> None:
        self.active = False
        self._batch = self._round = 0
        self._last: float | None = None  # the weight of this rank in the last synchronisation
        self._ranks: tuple[int, ...] | None = None  # the members among whom it was; `None`: the present ones

    def begin(self) -> None:
        """Weight averages from now on."""
        self.active = True

    def count(self, samples: int) -> None:
        """Count samples of the batch under way.

        Raises:
            ValueError: If that is not a whole number >= 0.

        """
        if not is_whole(samples) or samples < 0:
            raise ValueError(
                "LocalUpdateStrategy: `samples` is how many samples this rank trains on in a batch, so it must be a "
                f"whole number >= 0; got {samples!r}. Give 0 for a batch that only keeps this rank in step."
            )
        self._batch += samples

    def end_batch(self, *, in_round: bool = True) -> None:
        """Add the batch to its round; not where gradients were averaged, since ranks are equal after it."""
        self._round += self._batch if in_round else 0
        self._batch = 0

    @property
    def sent(self) -> float | None:
        """The samples since the last synchronisation, to send to the others; ``None`` if nothing is weighted."""
        return float(self._round) if self.active else None

    def weight_of(self, members: Members, rows: list[RankStatus]) -> float | None:
        """Return the weight of this rank in a mean, from the status of all ranks; ``None`` if all weights are equal.

        Where no rank has trained since the last synchronisation, the weight is that of then, so that an average right
        after a compressed one has the same mean; before the first one, and among other members than then, it is equal.
        """
        if not self.active:
            return None
        if self._ranks not in (None, members.ranks):
            self._last = None
        self._ranks = members.ranks
        counts = [row.samples or 0.0 for row in rows]
        if sum(counts) > 0:
            return members.share(counts)
        return members.share() if self._last is None else self._last

    def exchange(self, recorder: Recorder, device: torch.device, wait: Callable[[Pending], None]) -> float | None:
        """Return the weight of this rank, from counts that all ranks send here if anything is weighted."""
        if not self.active:
            return None
        rows = rank_status.exchange(RankStatus(samples=self.sent), recorder, device, wait)
        return self.weight_of(recorder.members, rows)

    def begin_round(self, weight: float | None) -> None:
        """Count anew, after a synchronisation in which this rank had this weight."""
        self._round, self._last = 0, weight

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed run needs to go on within a round; ``None`` if nothing is weighted."""
        last = self._last
        saved = [float(last), last.begin, last.end] if isinstance(last, Share) else last
        return {"samples": self._round, "last_weight": saved} if self.active else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what :meth:`state_dict` returned; ``None`` is from a run that did not count, and starts at 0."""
        if state is not None:
            last = state["last_weight"]
            self._round, self._last = int(state["samples"]), Share(*last) if isinstance(last, list) else last
