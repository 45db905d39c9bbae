"""Parameters that no stage has, and that the module may change itself: those of a teacher, a momentum encoder."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_comm.transport.content import content
from lightning_comm.transport.cyclic_buffers import average_buffers
from lightning_comm.transport.recording import Recorder


class UntrainedParameters:
    """Brings parameters together that have changed on some rank since ranks were equal.

    Args:
        parameters: The same ones on all ranks, equal now.

    Note:
        *Communication.* A byte for each parameter, by an all-gather, so that all ranks know what has changed on any;
        and these are averaged as buffers are.

    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [parameter.detach() for parameter in parameters]
        self._noted = content(self._parameters)

    @torch.no_grad()
    def bring_together(self, recorder: Recorder) -> None:
        """Average those that have changed on any rank; floating-point ones, and others are those of rank 0."""
        if not self._parameters:
            return
        now = content(self._parameters)
        moved = [not torch.equal(*pair) for pair in zip(self._noted, now, strict=True)]
        device = self._parameters[0].device
        rows, pending = recorder.all_gather(torch.tensor(moved, dtype=torch.uint8, device=device), "control")
        pending.wait()
        anywhere = rows.amax(0).tolist()
        apart = nn.Module()
        for number, parameter in enumerate(self._parameters):
            if anywhere[number]:
                apart.register_buffer(str(number), parameter)
        average_buffers(apart, recorder)
        for number in (number for number, each in enumerate(anywhere) if each):
            (self._noted[number],) = content([self._parameters[number]])
