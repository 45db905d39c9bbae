"""The status of each rank at an optimizer step, and the sum over the ranks, which all read two steps later."""

import math

import torch
from torch import Tensor

from lightning_comm.ondevice.cyclic.update import Number, whole_norm
from lightning_comm.strategies.cyclic import step_errors
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.settings import WHERE
from lightning_comm.transport.cyclic.requests import BATCH, RATE, Requests, check_finite
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.cyclic.stage_optimizer import SQUARED_NORM
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.stop_protocol import Decision

_READ = 0  # the stage whose status all ranks read


class StepStatus:
    """The status of this rank at a step (its batch, learning rates and losses), and the sum over all ranks.

    It travels with the gradients and returns with the new versions, so ranks compare themselves, and agree on
    requests, without a message of their own.

    Args:
        fit: What all parts of the run share.
        requests: The requests of ranks.
        ends: Reports an error with which all ranks end.

    Attributes:
        batch: The number of the batch of this ``fit``.
        saved_norm: The norm of the whole gradient of the step before the first one; ``None`` where it is not known.
        ring: Receives the status of others; set once the model is cut.

    """

    def __init__(self, fit: Fit, requests: Requests, ends: EpochEnds) -> None:
        self.batch = 0
        self.saved_norm: float | None = None
        self.ring: CyclicRing | None = None
        self._fit, self._progress = fit, fit.progress
        self._requests = requests
        self._ends = ends

        self._decided: list[Decision] = []
        self._batch_of: dict[int, int] = {}  # by step
        self._rate_of: dict[int, Number] = {}  # by step, the sum over the groups
        self._non_finite: Tensor | None = None
        self._warned_of_rates = False

    # ---- written -------------------------------------------------------------------------------------------------

    def note_loss(self, loss: Tensor, *, first: bool) -> None:
        """Note on the device whether a loss is finite.

        Args:
            loss: Before its backward.
            first: Whether what was computed before has been cleared, so that it reaches no parameter.

        """
        bad = (~torch.isfinite(loss.detach()).all()).to(torch.float64)
        self._non_finite = bad if first or self._non_finite is None else torch.maximum(self._non_finite, bad)

    def note_rate(self, rate: Number) -> None:
        """Note the sum of the learning rates of the step under way."""
        self._rate_of[self._progress.steps_done] = rate

    def of_stage(self, stage: int) -> Tensor:
        """Return this rank's status of the step under way, to travel with the gradients of a stage."""
        step = self._progress.steps_done
        self._batch_of[step] = self.batch
        return self._requests.status(
            step,
            self._non_finite,
            self._fit.module.device,
            asking=stage == _READ,
            batch=self.batch,
            rate=self._rate_of[step],
        )

    def end_step(self) -> None:
        """Forget the losses of the step that is over."""
        self._non_finite = None

    # ---- read ----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read what ranks have noted two steps ago, once after each step."""
        version = self._progress.steps_done - 2  # the newest that every rank has, whichever version it uses
        if version > self._progress.began_at:
            step, status = version - 1, self._status_of(version)
            self._check_finite(step, status)
            self._check_batch(step, status)
            self._compare_rates(step, status)
            del self._batch_of[step]
            self._decided += self._requests.decided(step, status, self._progress.steps_done)

    def newest(self) -> dict[int, list[float]]:
        """Return the summed status of the last two steps, which has not been read yet, by step; in a flush."""
        done = self._progress.steps_done
        return {step: self._status_of(step + 1) for step in (done - 2, done - 1) if step >= self._progress.began_at}

    def check(self, status: dict[int, list[float]]) -> None:
        """Raise an error if a loss was not finite, or ranks have taken a step in different batches."""
        for step, each in status.items():
            self._check_finite(step, each)  # each rank raises its own error, not that of the first to find it
            self._check_batch(step, each)

    def check_left_out(self) -> None:
        """End an announced step without an update, and raise an error if another rank has taken it."""
        assert self.ring is not None
        step = self._progress.steps_done
        self._batch_of[step] = 0
        with self._fit.agreement.first_error_shown():
            status = self.ring.leave_out(step, self._fit.agreement.poll_failures)
        self._check_batch(step, status[_READ])

    def take_decided(self) -> list[Decision]:
        """Return what ranks have agreed on since the last call."""
        decided, self._decided = self._decided, []
        return decided

    def norm_before(self, step: int) -> Number | None:
        """Return the norm of the whole gradient of the step before a step; ``None`` where it is not known."""
        if step == self._progress.began_at or self.ring is None:
            return self.saved_norm
        # called in a lane, which need not learn of failures: the computing thread does
        stages = range(self.ring.stages)
        if self._fit.module.device.type == "cuda":
            return whole_norm(list(self.ring.status_on_device(step, stages, lambda: None)[:, SQUARED_NORM]))
        return whole_norm([row[SQUARED_NORM] for row in self.ring.status(step, stages, lambda: None)])

    def _status_of(self, version: int) -> list[float]:
        assert self.ring is not None
        return self.ring.status(version, [_READ], self._fit.agreement.poll_failures)[0]

    def _check_finite(self, step: int, status: list[float]) -> None:
        try:
            check_finite(step, status, WHERE)
        except RuntimeError:
            self._fit.meet()  # a rank that left at once would close connections on which others wait
            raise

    def _check_batch(self, step: int, status: list[float]) -> None:
        """Refuse ranks that take a step in different batches, since one of them has skipped a step."""
        own, workers = self._batch_of[step], self._fit.recorder.world_size
        others = status[BATCH] - own
        if others != own * (workers - 1):
            raise self._ends.publish_failure(step_errors.different_batches(step, own, others, workers))

    def _compare_rates(self, step: int, status: list[float]) -> None:
        """Warn if learning rates differ between ranks, since each uses its own for the stages that it owns."""
        workers = self._fit.recorder.world_size
        own = float(self._rate_of.pop(step))
        others = (status[RATE] - own) / max(1, workers - 1)
        differ = workers > 1 and not math.isclose(own, others, rel_tol=1e-9)
        if differ and not self._warned_of_rates:
            self._warned_of_rates = True
            step_errors.warn_of_different_rates(step, own, others)
