"""When the average in the background departs, goes on and lands: at steps that are the same on all ranks."""

from collections.abc import Set
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_comm.ondevice.device_clock import DeviceClock, Moment
from lightning_comm.strategies.local_update.round_log import RoundLog
from lightning_comm.strategies.local_update.settings import InFlight
from lightning_comm.transport.model_average import Replica
from lightning_comm.transport.stop_protocol import Agreement


class BackgroundAverage:
    """The average that travels while the next round trains.

    It departs at the end of a round, as the weights are then, and lands a number of steps later that is known when the
    next round begins. So what a run computes does not depend on how fast the network is.

    Args:
        replica: Has the weights.
        log: Notes the round once its average has landed.
        agreement: Shows whose error it is when a wait fails.
        overlap_steps: After how many steps an average lands, where the round has as many.
        device_clock: Says how long training has stood still.

    """

    def __init__(
        self, replica: Replica, log: RoundLog, agreement: Agreement, overlap_steps: int, device_clock: DeviceClock
    ) -> None:
        self._replica = replica
        self._log = log
        self._agreement = agreement
        self._overlap_steps = overlap_steps
        self._clock = device_clock
        self._flight: InFlight | None = None
        self._stood_still: list[tuple[Moment, Moment]] = []  # for this flight, beside its `transfer_s`
        self._said_clamped = False

    def depart(
        self,
        *,
        step: int,
        period_steps: int,
        lr: float,
        wait_s: float,
        weight: float | None = None,
        moderate: Set[str] = frozenset(),
    ) -> None:
        """Start to average the weights of now, in a thread.

        Args:
            step: Optimizer steps done.
            period_steps: Length of the round that ends here.
            lr: Learning rate at the first step of that round.
            wait_s: Seconds until all ranks had arrived.
            weight: What this rank counts for in the mean; ``None`` on all ranks: equally.
            moderate: As in :meth:`Replica.average`.

        """
        self.land()  # still in flight only where a resumed run has shorter rounds
        started = self._clock.mark()
        self._replica.depart(weight, moderate)
        self._flight = InFlight(step, period_steps, lr, wait_s, 0.0)
        self._stood_still = [(started, self._clock.mark())]

    def begin_round(self, step: int, next_steps: int) -> None:
        """Choose where the average lands: within the round of ``next_steps`` that begins at ``step``."""
        if self._flight is None:
            return
        steps = min(self._overlap_steps, next_steps - 1)
        if steps < self._overlap_steps and not self._said_clamped:
            self._said_clamped = True
            rank_zero_info(
                f"LocalUpdateStrategy: `overlap_steps`={self._overlap_steps} is not below the {next_steps} steps of "
                f"the round that begins at step {step}, so its average lands after {steps}: one step less than the "
                "round has, here and in all rounds as short."
            )
        self._flight = replace(self._flight, land_at=step + steps)
        self.go_on(step)

    def go_on(self, step: int) -> None:
        """Land the average if that is due after ``step`` optimizer steps."""
        flight = self._flight
        if flight is not None and flight.land_at is not None and step >= flight.land_at:
            self.land()

    def land(self) -> None:
        """Wait for the average, if one is in flight, and move the weights by it."""
        if self._flight is None:
            return
        self.wait()
        started = self._clock.mark()
        with self._agreement.first_error_shown():
            summed = self._replica.land()
        self._stood_still.append((started, self._clock.mark()))
        drift = summed.read()
        flight, self._flight = self._measured(self._flight), None
        self._log.add(
            step=flight.step,
            period_steps=flight.period_steps,
            lr=flight.lr,
            wait_s=flight.wait_s,
            transfer_s=flight.transfer_s,
            drift=drift,
        )

    def wait(self) -> None:
        """Wait until the average has arrived, if one is in flight. The weights stay as they are."""
        if not self._replica.is_sending:
            return
        started = self._clock.mark()
        with self._agreement.first_error_shown():
            while not self._replica.is_quiet(timeout_s=0.05):
                self._agreement.listen()  # or a rank that failed, and lives on, would be waited for
            self._replica.wait_for_background()
        self._stood_still.append((started, self._clock.mark()))

    def _measured(self, flight: InFlight) -> InFlight:
        """Return the flight with the time that training has stood still for it, once the device has done that."""
        seconds = sum(self._clock.seconds(*span) for span in self._stood_still)
        self._stood_still = []
        return replace(flight, transfer_s=flight.transfer_s + seconds)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed run needs beside what the replica keeps."""
        if self._flight is not None:
            self._flight = self._measured(self._flight)
        return None if self._flight is None else asdict(self._flight)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up what :meth:`state_dict` returned, if the replica has what belongs to it."""
        self._flight = InFlight(**state) if state is not None and self._replica.in_flight else None
