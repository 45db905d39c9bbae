"""Members of a round: the process group in force, its ranks, and the weight of each in a mean."""

from collections.abc import Sequence

import torch.distributed as dist

from lightning_comm.ondevice.share import Share


class Members:
    """The ranks of one process group, which take part in messages.

    All objects that send, average or count on a group hold the same object and ask it at every call, so a change of the
    members reaches all of them at once. It may change between two rounds alone: within a round, ranks have trained with
    the others of that round in mind.

    Args:
        group: The process group; ``None``: the default group.

    Attributes:
        group: The process group in force.
        ranks: Its ranks, in their order, by their numbers in the default group.
        rank: The place of this rank among them, from 0.

    Raises:
        ValueError: If this rank is not in the group.

    Note:
        *Communication.* None.

    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._in_round = False
        self._join(group)

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
        """Let the members change."""
        self._in_round = False

    def change(self, group: dist.ProcessGroup | None) -> None:
        """Let another group of ranks take part from here on; on all of its ranks alike.

        Raises:
            RuntimeError: If a round is under way.
            ValueError: If this rank is not in the group.

        """
        if self._in_round:
            raise RuntimeError(
                f"Members: `group` may change between two rounds alone; it was given within a round of the ranks "
                f"{list(self.ranks)}. Change it after `end_round`."
            )
        self._join(group)

    def _join(self, group: dist.ProcessGroup | None) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                f"Members: `group` must be a process group that this rank is in; got one without rank "
                f"{dist.get_rank()}. Only its members may take part."
            )
        # no reference to the default group is held: leaving it counts on being the last to release it
        whole = dist.group.WORLD if group is None else group
        self.group, self.rank = group, rank
        self.ranks = tuple(dist.get_process_group_ranks(whole))
