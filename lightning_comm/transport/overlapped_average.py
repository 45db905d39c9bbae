"""An average that travels while the next round trains: its thread, what is in flight, and where that lands."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from lightning_comm.ondevice.device_clock import DeviceClock, Moment
from lightning_comm.ondevice.flat import Drift
from lightning_comm.transport.background_thread import BackgroundStreams, BackgroundThread
from lightning_comm.transport.departed_average import DepartedAverage

_LISTEN_S = 0.05  # how long a failure of another rank may go unheard while this one waits


class FailuresHeard(Protocol):
    """What tells, in a wait, that another rank has failed; see :class:`~.stop_protocol.Agreement`."""

    def first_error_shown(self) -> AbstractContextManager[None]:
        """Turn the loss of a connection into an error that names the rank that failed."""
        ...

    def listen(self) -> None:
        """Raise if another rank has failed."""


@dataclass(frozen=True)
class EndedRound:
    """A round that is over.

    Args:
        step: Optimizer steps done when it ended.
        period_steps: Length of the round.
        lr: Learning rate at the first step of that round.
        wait_s: Seconds until all ranks had arrived.
        transfer_s: Seconds of its averages; of those in the background, for which training has stood still so far.
        land_at: After how many optimizer steps the average in the background is applied; ``None`` until the next round
            begins, and where nothing is in flight.

    """

    step: int
    period_steps: int
    lr: float
    wait_s: float
    transfer_s: float = 0.0
    land_at: int | None = None


class OverlappedAverage:
    """The average of a round that is over, from its departure until it lands.

    It departs with the parameters as they are at the end of a round, and lands a number of steps later that is known
    when the next round begins. So what a run computes does not depend on how fast the network is. The thread that
    carries it out is this object's, and so is the order in which others wait for it.

    Args:
        parameters: Returns the parameters by name, which are moved at landing.
        overlap_steps: After how many steps an average lands, where the round has as many.
        failures: Hears of those of other ranks in a wait.
        clock: Says how long training has stood still.
        landed: Called with the round and how far this rank was from the mean, when the parameters have moved.
        inform: Called once, with a sentence, where a round is too short.

    Note:
        *Communication.* That of the average which departs, in a thread. On CUDA nothing else may be sent meanwhile:
        two groups that send at once may wait for each other. See :meth:`wait`.

    """

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        overlap_steps: int,
        failures: FailuresHeard,
        clock: DeviceClock,
        landed: Callable[[EndedRound, Drift], None],
        inform: Callable[[str], None],
    ) -> None:
        self._parameters = parameters
        self._overlap_steps = overlap_steps
        self._failures = failures
        self._clock = clock
        self._landed = landed
        self._inform = inform
        self._streams = BackgroundStreams()
        self._thread: BackgroundThread | None = None
        self._departed: DepartedAverage | None = None
        self._round: EndedRound | None = None  # that of what has departed
        self._stood_still: list[tuple[Moment, Moment]] = []  # for this round, beside its `transfer_s`
        self._said_too_short = False

    @property
    def corrections(self) -> list[Tensor]:
        """What landing moves the parameters by, once all has arrived; empty where nothing is in flight."""
        return [] if self._departed is None else self._departed.corrections

    @property
    def is_sending(self) -> bool:
        """Whether something may be on its way, or has arrived and nobody has waited for it."""
        return self._thread is not None

    def is_quiet(self, timeout_s: float) -> bool:
        """Wait for so long at most, and return whether nothing is on its way any more, for whatever reason."""
        return self._thread is None or self._thread.is_over(timeout_s)

    def depart(self, note: Callable[[], DepartedAverage], ended: EndedRound) -> None:
        """Start to average the parameters of now, in a thread.

        Args:
            note: Returns what departs. The time that it takes counts as time in which training stands still.
            ended: The round that ends here.

        """
        self.land()  # still in flight only where a resumed run has shorter rounds
        started = self._clock.mark()
        departed = note()
        self._thread = self._streams.start(departed.travel, departed.device)
        self._departed, self._round = departed, ended
        self._stood_still = [(started, self._clock.mark())]

    def begin_round(self, step: int, next_steps: int) -> None:
        """Choose where the average lands: within the round of ``next_steps`` that begins at ``step``."""
        if self._round is None:
            return
        steps = min(self._overlap_steps, next_steps - 1)
        if steps < self._overlap_steps and not self._said_too_short:
            self._said_too_short = True
            self._inform(
                f"LocalUpdateStrategy: `overlap_steps`={self._overlap_steps} is not below the {next_steps} steps of "
                f"the round that begins at step {step}, so its average lands after {steps}: one step less than the "
                "round has, here and in all rounds as short."
            )
        self._round = replace(self._round, land_at=step + steps)
        self.land_if_due(step)

    def land_if_due(self, step: int) -> None:
        """Land the average if that is due after ``step`` optimizer steps."""
        ended = self._round
        if ended is not None and ended.land_at is not None and step >= ended.land_at:
            self.land()

    def land(self) -> None:
        """Wait for the average, if one is in flight, and move the parameters by it."""
        if self._departed is None or self._round is None:
            return
        self.wait()
        started = self._clock.mark()
        with self._failures.first_error_shown():
            self._departed.correct_(self._parameters())
        self._stood_still.append((started, self._clock.mark()))
        drift = self._departed.drift.read()
        ended = self._measured(self._round)
        self._departed = self._round = None
        self._landed(ended, drift)

    def wait(self) -> None:
        """Wait until the average has arrived, if one is in flight. The parameters stay as they are.

        On CUDA two groups that send at once may wait for each other, so this comes before whatever else ranks send.
        """
        if self._thread is None:
            return
        started = self._clock.mark()
        with self._failures.first_error_shown():
            while not self._thread.is_over(_LISTEN_S):
                self._failures.listen()  # or a rank that failed, and lives on, would be waited for
            self._join()
        self._stood_still.append((started, self._clock.mark()))

    def make_way(self) -> None:
        """Let nothing be on its way where that may hold up what others send in mid-round: on CUDA, see :meth:`wait`."""
        if self._clock.on_cuda:
            self.wait()

    def correct_(self, tensors: Mapping[str, Tensor]) -> None:
        """Move parameters, or copies of them, as landing would, once it has arrived; the average stays in flight."""
        self.wait()
        if self._departed is not None:
            self._departed.correct_(tensors)

    def departed_state(self) -> list[dict[str, Any]]:
        """Return what belongs to the parameters of what is in flight, when that has arrived."""
        self.wait()
        return [] if self._departed is None else self._departed.state_dict()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed run needs of the round in flight, besides :meth:`departed_state`."""
        if self._round is not None:
            self._round = self._measured(self._round)
        return None if self._round is None else asdict(self._round)

    def load_state_dict(self, state: dict[str, Any] | None, departed: DepartedAverage | None) -> None:
        """Restore what :meth:`state_dict` returned, with what had departed; nothing where either is missing."""
        if state is not None and departed is not None and departed.corrections:
            self._round, self._departed = EndedRound(**state), departed

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and self._departed is not None:
            thread.join()
            self._departed.arrived()

    def _measured(self, ended: EndedRound) -> EndedRound:
        """Return the round with the time that training has stood still for it, once the device has done that."""
        seconds = sum(self._clock.seconds(*span) for span in self._stood_still)
        self._stood_still = []
        return replace(ended, transfer_s=ended.transfer_s + seconds)
