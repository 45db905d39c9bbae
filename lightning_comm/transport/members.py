"""Members of a round: their process groups in force, their ranks, and the weight of each in a mean."""

from collections.abc import Sequence

import torch.distributed as dist

from lightning_comm.ondevice.share import Share


class Members:
    """The ranks that take part in messages, by one process group or by two.

    All objects that send, average or count for these ranks hold the same object and ask it at every call, so a change
    of the members reaches all of them at once. It may change between two rounds alone, and not while an average is in
    flight: within a round, ranks have trained with the others of that round in mind, and an average that lands belongs
    to the ranks that sent it.

    Args:
        group: The process group; ``None``: the default group.
        background: A second process group of the same ranks, for a background thread, whose messages are not ordered
            with those of the first; ``None``: nothing is sent in the background.

    Attributes:
        group: The process group in force.
        background: The one in force for a background thread.
        ranks: The members, in the order of the group, by their numbers in the default group.
        rank: The place of this rank among them, from 0.

    Raises:
        ValueError: If this rank is not in the group, or the second group has other ranks.

    Note:
        *Communication.* None.

    """

    def __init__(self, group: dist.ProcessGroup | None = None, background: dist.ProcessGroup | None = None) -> None:
        self._in_round = False
        self._in_flight = 0
        self._join(group, background)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.ranks)

    def share(self, counts: Sequence[float] | None = None) -> Share:
        """Return the weight of this rank in a mean.

        Args:
            counts: For how much each member counts, in their order; ``None``: all for the same.

        """
        return Share.of([1] * self.size if counts is None else counts, self.rank)

    def begin_round(self) -> None:
        """Keep the members as they are until :meth:`end_round`."""
        self._in_round = True

    def end_round(self) -> None:
        """Let the members change, once no average is in flight."""
        self._in_round = False

    def begin_flight(self) -> None:
        """Keep the members as they are until :meth:`end_flight`: an average departs, or is restored in flight."""
        self._in_flight += 1

    def end_flight(self) -> None:
        """Note that an average has landed."""
        self._in_flight -= 1

    def change(self, group: dist.ProcessGroup | None, background: dist.ProcessGroup | None = None) -> None:
        """Let another group of ranks take part from here on; on all of its ranks alike.

        Args:
            group: As for the object itself.
            background: As there; needed where there was one.

        Raises:
            RuntimeError: If a round is under way, or an average is in flight.
            ValueError: If this rank is not in the group, or the second group is missing or has other ranks.

        """
        if self._in_round:
            raise RuntimeError(
                f"Members: `group` may change between two rounds alone; it was given within a round of the ranks "
                f"{list(self.ranks)}. Change it after `end_round`."
            )
        if self._in_flight:
            raise RuntimeError(
                f"Members: `group` may change only where no average is in flight; it was given while one of the ranks "
                f"{list(self.ranks)} is. Let it land first, on all of them: `OverlappedAverage.land()`."
            )
        if self.background is not None and background is None:
            raise ValueError(
                f"Members: `background` must be a second process group of the new members, since averages of the ranks "
                f"{list(self.ranks)} travel in the background; got None. Make one of the ranks of `group`."
            )
        self._join(group, background)

    def _join(self, group: dist.ProcessGroup | None, background: dist.ProcessGroup | None) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                f"Members: `group` must be a process group that this rank is in; got one without rank "
                f"{dist.get_rank()}. Only its members may take part."
            )
        # no reference to the default group is held: leaving it counts on being the last to release it
        ranks = _ranks_of(dist.group.WORLD if group is None else group)
        if background is not None and (others := _ranks_of(background)) != ranks:
            raise ValueError(
                f"Members: `background` must have the ranks of `group` in their order, {list(ranks)}; got one of "
                f"{list(others)}. Make both of the same ranks."
            )
        self.group, self.background, self.rank, self.ranks = group, background, rank, ranks


def _ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
