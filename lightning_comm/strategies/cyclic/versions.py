"""The versions of a model's stages: put in place by the schedule, and watched for changes until the next one."""

import time
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.ondevice.content import Contents
from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.strategies.cyclic import step_errors
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.transport.cyclic.ring import CyclicRing

_NOTICEABLE_S = 5e-5  # shorter waits are not worth a record


class ModelVersions:
    """Writes new versions into the model's parameters, in the thread that trains, between a backward and a forward.

    Args:
        fit: What all parts of the run share.
        schedule: Which version is used when.
        stages: Of the model.
        parameters: Those of each stage.
        ring: Receives the versions.

    """

    def __init__(
        self,
        fit: Fit,
        schedule: CyclicSchedule,
        stages: Sequence[Stage],
        parameters: Sequence[Sequence[Parameter]],
        ring: CyclicRing,
    ) -> None:
        self._fit, self._schedule, self._parameters, self._ring = fit, schedule, parameters, ring
        self._held = [fit.progress.steps_done] * len(stages)
        self._contents = Contents(
            [dict(zip(stage.parameters, own, strict=True)) for stage, own in zip(stages, parameters, strict=True)]
        )
        for number in range(len(stages)):
            self._contents.note(number)

    def use_in_step(self, stage: int) -> None:
        """Put in place the version with which the step under way computes."""
        progress = self._fit.progress
        rank = self._fit.recorder.rank
        version = self._schedule.version(rank, stage, progress.steps_done, progress.flushed_at)
        if version > self._held[stage]:
            self._contents.compare(stage)
            self.check_unchanged()
            with self._fit.agreement.first_error_shown():
                self._put_in_place(stage, version)

    def use_newest(self) -> None:
        """Put the newest version of every stage in place."""
        newest = self._fit.progress.steps_done
        for stage in range(len(self._held)):
            self._contents.compare(stage)
        self.check_unchanged(wait=True)
        with self._fit.agreement.first_error_shown():
            for stage in reversed(range(len(self._held))):
                if self._held[stage] < newest:
                    self._put_in_place(stage, newest)

    def check_unchanged(self, *, wait: bool = False) -> None:
        """Refuse parameters that were changed by other code since their version was put in place.

        Args:
            wait: Whether to wait for the device to compare them.

        """
        if self._contents.changed(wait=wait):
            for stage in range(len(self._held)):
                self._contents.compare(stage)  # to name those of other stages as well
            raise step_errors.changed_parameters(self._fit.progress.steps_done, self._contents.changed(wait=True))

    def _put_in_place(self, stage: int, version: int) -> None:
        since_s = time.monotonic()
        message = self._ring.take(stage, version, self._fit.agreement.poll_failures)
        if time.monotonic() - since_s > _NOTICEABLE_S:
            self._fit.recorder.waited("wait", since_s)
        with torch.no_grad():
            for parameter, part in zip(self._parameters[stage], message.parts, strict=True):
                parameter.copy_(part)
        self._ring.release(stage, version)
        self._held[stage] = version
        self._contents.note(stage)
