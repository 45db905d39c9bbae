"""An average in flight while the next round trains: its thread, its state, and the step at which it is applied.

In names, an average *departs* at the end of a round, when its thread starts, and *lands* at the step of the next round
at which the parameters move by it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from lightning_comm.ondevice.device_clock import DeviceClock, DeviceEvent
from lightning_comm.ondevice.flat import Drift
from lightning_comm.transport.background_thread import BackgroundStreams, BackgroundThread
from lightning_comm.transport.departed_average import DepartedAverage

_LISTEN_S = 0.05  # seconds between looks for a failure of another rank, while this one waits


class FailureSource(Protocol):
    """A source of other ranks' failures, asked during a wait; see :class:`~.stop_protocol.Agreement`."""

    def first_error_shown(self) -> AbstractContextManager[None]:
        """Turn the loss of a connection into an error that names the rank that failed."""
        ...

    def poll_failures(self) -> None:
        """Raise if another rank has failed."""


@dataclass(frozen=True)
class EndedRound:
    """A round that is over.

    Args:
        step: Optimizer steps done when it ended.
        period_steps: Length of the round.
        lr: Learning rate at the first step of that round.
        wait_s: Seconds until all ranks had arrived.
        transfer_s: Seconds of its blocking averages, and those for which training has waited so far for its average in
            the background.
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
    """The average of a round that is over, from its departure until it is applied.

    It departs with the parameters as they are at the end of a round, and lands after a number of steps that is fixed
    when the next round begins. So what a run computes does not depend on how fast the network is. This object owns the
    thread, and all waits for it go through :meth:`wait`. Until it lands, the members cannot change.

    Args:
        parameters: Returns the parameters by name, which the average moves when it lands.
        overlap_steps: After how many steps an average lands, unless the round is shorter.
        failures: Asked, during a wait, whether another rank has failed.
        clock: Measures how long training has stood still.
        landed: Called with the round and this rank's distance from the mean, when the parameters have moved.
        inform: Called once, with a sentence for the user, where a round is too short.

    Note:
        *Communication.* That of the average which departs, in a thread. On CUDA nothing else may be sent meanwhile:
        two groups that send at once may deadlock. See :meth:`wait`.

    """

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        overlap_steps: int,
        failures: FailureSource,
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
        self._round: EndedRound | None = None  # the round whose average is in flight
        # Spans in which training stood still for it. They are read late, at landing: on CUDA the host would wait.
        self._stood_still: list[tuple[DeviceEvent, DeviceEvent]] = []
        self._informed = False  # of a round that is too short

    @property
    def corrections(self) -> list[Tensor]:
        """The changes that landing adds to the parameters, once all has arrived; empty where nothing is in flight."""
        return [] if self._departed is None else self._departed.corrections

    @property
    def is_sending(self) -> bool:
        """Whether a thread may still send, or has ended and has not been waited for."""
        return self._thread is not None

    def is_quiet(self, timeout_s: float) -> bool:
        """Wait for so long at most; return whether no thread sends any more, be it done or failed."""
        return self._thread is None or self._thread.is_over(timeout_s)

    def depart(self, note: Callable[[], DepartedAverage], ended: EndedRound) -> None:
        """Start to average the present parameters, in a thread.

        Args:
            note: Copies the parameters and returns their average, not started. Training stands still meanwhile.
            ended: The round that ends here.

        """
        self.land()  # still in flight only where a resumed run has shorter rounds
        started = self._clock.mark()
        departed = note()
        departed.begin_flight()
        self._thread = self._streams.start(departed.travel, departed.device)
        self._departed, self._round = departed, ended
        self._stood_still = [(started, self._clock.mark())]

    def begin_round(self, step: int, next_steps: int) -> None:
        """Choose where the average lands: within the round of ``next_steps`` that begins at ``step``."""
        if self._round is None:
            return
        # It must land within the next round, before its last step: the average after that one departs there.
        steps = min(self._overlap_steps, next_steps - 1)
        if steps < self._overlap_steps and not self._informed:
            self._informed = True
            self._inform(
                f"LocalUpdateStrategy: `overlap_steps`={self._overlap_steps} is not below the {next_steps} steps of "
                f"the round that begins at step {step}, so its average lands after {steps}: one step less than the "
                "round has, here and in all rounds as short."
            )
        self._round = replace(self._round, land_at=step + steps)
        self.land_if_due(step)  # at once before a round of a single step

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
        self._departed.end_flight()
        drift = self._departed.drift.read()
        ended = self._measured(self._round)
        self._departed = self._round = None
        self._landed(ended, drift)

    def wait(self) -> None:
        """Wait until the average has arrived, if one is in flight. The parameters stay as they are.

        On CUDA two groups that send at once may deadlock, so this comes before any other message of the ranks.
        """
        if self._thread is None:
            return
        started = self._clock.mark()
        with self._failures.first_error_shown():
            while not self._thread.is_over(_LISTEN_S):
                self._failures.poll_failures()  # a rank that failed, but whose process lives, breaks no connection
            self._join()
        self._stood_still.append((started, self._clock.mark()))

    def make_way(self) -> None:
        """Wait for the average where other messages in the middle of a round could deadlock with it: on CUDA."""
        if self._clock.on_cuda:
            self.wait()

    def correct_(self, tensors: Mapping[str, Tensor]) -> None:
        """Move parameters, or copies of them, as landing would, once it has arrived; the average stays in flight."""
        self.wait()
        if self._departed is not None:
            self._departed.correct_(tensors)

    def departed_state(self) -> list[dict[str, Any]]:
        """Return the part of the state in flight that belongs to parameters; waits until it has arrived."""
        self.wait()
        return [] if self._departed is None else self._departed.state_dict()

    def state_dict(self) -> dict[str, Any] | None:
        """Return the round whose average is in flight, which a resumed run needs besides :meth:`departed_state`."""
        if self._round is not None:
            self._round = self._measured(self._round)
        return None if self._round is None else asdict(self._round)

    def load_state_dict(self, state: dict[str, Any] | None, departed: DepartedAverage | None) -> None:
        """Restore the round and its average in flight; does nothing where either is missing."""
        if state is not None and departed is not None and departed.corrections:
            departed.begin_flight()
            self._round, self._departed = EndedRound(**state), departed

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and self._departed is not None:
            thread.join()
            self._departed.arrived()

    def _measured(self, ended: EndedRound) -> EndedRound:
        """Return the round with the time for which training has stood still; waits until the device is so far."""
        seconds = sum(self._clock.seconds(*span) for span in self._stood_still)
        self._stood_still = []
        return replace(ended, transfer_s=ended.transfer_s + seconds)
