"""The schedule of a pruning, and the kept share above which it no longer pays to leave pruned entries out.

Standard library only, and no messages: numbers go in and a share comes out, the same on every rank.
"""

from dataclasses import dataclass

from lightning_comm.core.arguments import is_whole


@dataclass(frozen=True)
class PruningSchedule:
    r"""The optimizer steps at which weights are pruned, and the share of pruned weights from each of them on.

    Without ``end_step`` all are pruned at once, before step ``start_step``. With it they are pruned bit by bit, every
    ``every_steps`` steps and at last before step ``end_step``, until the share

    .. math:: s_t = s_f \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right)

    is the final one: many while the network has many to spare, ever fewer towards the end.

    Steps are optimizer steps done, as in ``trainer.global_step``: *before step 100* is when 100 are done. So under
    manual optimization those of all optimizers count, and a second ``fit`` of a Trainer goes on counting; under local
    updates the steps of a run are those of the counted optimizer. Until the first pruning the model trains dense.

    Args:
        start_step: When the pruning begins; at least 0.
        end_step: When the final share is reached; above ``start_step``. ``None``: all at once at ``start_step``.
        every_steps: Steps from one pruning to the next on the way; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None. *Memory.* None.

        *Where it differs.* The paper prunes at ``start_step`` too, where the share is still 0; here nothing happens
        then.

    Example:
        >>> schedule = PruningSchedule(start_step=100, end_step=300, every_steps=100)
        >>> [step for step in range(1000) if schedule.due(step)]
        [200, 300]
        >>> [round(schedule.sparsity_at(step, 0.8), 3) for step in (199, 200, 299, 300)]
        [0.0, 0.7, 0.7, 0.8]

    References:
        M. Zhu, S. Gupta. `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_. 2017.

    """

    start_step: int = 0
    end_step: int | None = None
    every_steps: int = 100

    def __post_init__(self) -> None:
        if not is_whole(self.start_step) or self.start_step < 0:
            raise ValueError(
                f"PruningSchedule: `start_step` counts optimizer steps, so it must be a whole number >= 0; got "
                f"{self.start_step!r}. 0 prunes when training starts."
            )
        if self.end_step is not None and not (is_whole(self.end_step) and self.end_step > self.start_step):
            raise ValueError(
                f"PruningSchedule: `end_step` counts optimizer steps, so it must be a whole number above `start_step`="
                f"{self.start_step}; got {self.end_step!r}. Leave it out to prune all at once."
            )
        if not is_whole(self.every_steps) or self.every_steps < 1:
            raise ValueError(
                f"PruningSchedule: `every_steps` counts optimizer steps, so it must be a whole number >= 1; got "
                f"{self.every_steps!r}."
            )

    @property
    def is_gradual(self) -> bool:
        """Whether weights are pruned bit by bit."""
        return self.end_step is not None

    @property
    def first_step(self) -> int:
        """The step before which weights are pruned for the first time."""
        if self.end_step is None:
            return self.start_step
        return min(self.start_step + self.every_steps, self.end_step)

    def due(self, step: int) -> bool:
        """Return whether weights are pruned before step ``step``."""
        return self.last_due(step) == step

    def last_due(self, step: int) -> int | None:
        """Return the last step, up to ``step``, before which weights are pruned, or ``None`` if there was none yet."""
        if step < self.first_step:
            return None
        if self.end_step is None or step >= self.end_step:
            return self.start_step if self.end_step is None else self.end_step
        return step - (step - self.start_step) % self.every_steps

    def sparsity_at(self, step: int, final: float) -> float:
        """Return the share of pruned weights during step ``step``: that of the last pruning.

        Args:
            step: Optimizer steps done.
            final: The share at the end.

        """
        last = self.last_due(step)
        if last is None:
            return 0.0
        if self.end_step is None or last == self.end_step:
            return final
        left = (self.end_step - last) / (self.end_step - self.start_step)
        return final * (1 - left**3)


def break_even_share(packing: tuple[tuple[float, float], tuple[float, float]], send_s: float) -> float:
    """Return the kept share above which packing takes longer than sending what is left out would.

    Packing a row takes a fixed time (to set it to zero) and one in proportion to what is kept (to gather and scatter
    it); two measurements give both. What is left out takes its share of the time of the whole row.

    Args:
        packing: Two kept shares, each with the seconds that packing took.
        send_s: Seconds that the whole row takes on the link, without the latency, which is paid either way.

    Returns:
        A share from 0 (packing never pays) to 1 (it always does).

    Example:
        >>> break_even_share(((0.1, 0.012), (0.9, 0.028)), send_s=0.1)
        0.75

    """
    (few, few_s), (many, many_s) = packing
    slope_s = max(0.0, (many_s - few_s) / (many - few))
    fixed_s = max(0.0, few_s - slope_s * few)
    if send_s <= fixed_s:
        return 0.0
    return (send_s - fixed_s) / (send_s + slope_s)
