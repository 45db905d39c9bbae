"""Windows of a partitioned run: the times of ranks in each, the balancer's decision, and the plan that follows.

All ranks use the same times and the same arithmetic, so no decision needs a message.
"""

import math
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_comm.callbacks.adaptive_partition.memory import MemoryRoom
from lightning_comm.callbacks.adaptive_partition.meter import PartitionMeter, RankTimes
from lightning_comm.callbacks.adaptive_partition.record import PartitionRecord
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.callbacks.adaptive_partition.start import StartOfRun
from lightning_comm.core.adaptive_partition.balancing import Balancer, Forecast
from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.core.quantities import times_as_fast
from lightning_comm.data.adaptive_partition.slices import Slice
from lightning_comm.instruments.busy_time import BusyTimer

_DATA_BOUND = 0.2  # of the busy time


class PartitionWindows:
    """Compares the times of ranks window by window, and lets the plan change where that makes steps shorter.

    Args:
        settings: What the user chose.
        start: The state at the start; its plan is the one that loaders follow.
        record: Notes each window.
        timer: Measures the batches of this rank.
        memory: Knows how many samples fit on this rank's GPU.

    Note:
        *Communication.* None: the session gathers the times.

    """

    def __init__(
        self,
        settings: PartitionSettings,
        start: StartOfRun,
        record: PartitionRecord,
        timer: BusyTimer,
        memory: MemoryRoom,
    ) -> None:
        self._meter = PartitionMeter(timer, settings.warmup_steps)
        self._plan = start.plan
        self._record = record
        self._timer = timer
        self._memory = memory
        self._window_steps = settings.window_steps
        self._moves = settings.mode == "balance" and not start.replays
        self._replays = start.replays
        ranks, total = len(start.lo), sum(start.plan.sizes)
        self._balancer = Balancer(ranks, total, start.lo, start.hi, min_gain=settings.min_gain)
        if start.balancer is not None:
            self._balancer.load_state_dict(start.balancer)
        self._warned_of_data = self._warned_of_waits = False

    def begin_batch(self, slices: list[Slice]) -> None:
        """Begin a batch, of which this rank has a slice from each of several loaders."""
        first = slices[0]
        self._meter.begin(
            first.sizes,
            full=first.total == sum(self._plan.sizes),
            started_s=min(each.fetch_started_s for each in slices),
            fetch_s=sum(each.fetch_s for each in slices),
        )

    def end_batch(self) -> None:
        """End a batch."""
        self._meter.end()

    def leave_training(self) -> None:
        """Something other than training follows, so the step is over."""
        self._meter.leave_training()

    def is_over(self, place: BatchIndex) -> bool:
        """Whether the window of the batch at a place has enough batches, and no decided change is still to come.

        The same on all ranks: a change that was decided holds on all of them before times are compared again.
        """
        change_is_to_come = not self._replays and self._plan.changes[-1].place > place
        return not change_is_to_come and self._meter.batches >= self._window_steps

    def own_times(self, place: BatchIndex, dispatched: BatchIndex, rank: int) -> RankTimes:
        """Return this rank's times of the window, and begin another one.

        Args:
            place: The batch that ends the window.
            dispatched: The first batch that no loader of this rank has passed yet.
            rank: This rank.

        """
        times = self._meter.times(dispatched, self._memory.cap(self._plan.sizes_at(place)[rank]))
        self._meter.begin_window()
        return times

    def compare(self, ranks: list[RankTimes], place: BatchIndex) -> bool:
        """Learn from the times of all ranks, and change the plan if that pays.

        Returns:
            Whether all ranks have measured something.

        """
        if any(math.isnan(times.busy_s) for times in ranks):
            return False  # a rank has no times to compare: no backward, or a device that is far behind
        sizes = self._plan.sizes_at(place)
        step_s = max(times.busy_s if math.isnan(times.step_s) else times.step_s for times in ranks)
        caps = [None if times.cap < 0 else int(times.cap) for times in ranks]
        self._balancer.observe(sizes, [times.busy_s for times in ranks], step_s=step_s, caps=caps)
        forecast = self._balancer.forecast()
        self._record.add_window(place, sizes, ranks, step_s, forecast)
        self._warn_of_slow_data(ranks)
        self._warn_of_hidden_waits()
        proposal = self._balancer.propose() if self._moves else None
        if proposal is not None and forecast is not None and proposal != sizes:
            # the first batch that no rank's loader has passed to its workers yet
            self._move(max(BatchIndex(int(times.epoch), int(times.batch)) for times in ranks), proposal, forecast)
        return True

    def _move(self, place: BatchIndex, sizes: tuple[int, ...], forecast: Forecast) -> None:
        self._plan.change_at(place, sizes)
        why = f"a step is expected to become {times_as_fast(1 / (1 - forecast.gain))}"
        self._record.why[place] = why
        rank_zero_info(
            f"AdaptivePartition: from batch {place.batch} of epoch {place.epoch} on, ranks take {list(sizes)} "
            f"samples; {why}."
        )

    def _warn_of_slow_data(self, ranks: list[RankTimes]) -> None:
        slow = [rank for rank, times in enumerate(ranks) if times.fetch_s > _DATA_BOUND * times.busy_s]
        if slow and not self._warned_of_data:
            self._warned_of_data = True
            share = max(times.fetch_s / times.busy_s for times in ranks)
            rank_zero_warn(
                f"AdaptivePartition: ranks {slow} wait for data for up to {100 * share:.0f} % of their busy time. "
                "Shares follow that too, but more loader workers (`num_workers`) may help more."
            )

    def _warn_of_hidden_waits(self) -> None:
        if self._timer.clock.on_cuda and self._timer.messages_within and not self._warned_of_waits:
            self._warned_of_waits = True
            rank_zero_warn(
                "AdaptivePartition: there are messages between ranks in the forward (a metric that is reduced on each "
                "step, BatchNorm's buffers or SyncBatchNorm, `all_gather`). On a GPU the wait in them cannot be told "
                "from compute, so ranks look more alike than they are. Log with `on_step=False`, and gather after the "
                "backward."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the ranks' speeds, in plain types."""
        return self._balancer.state_dict()
