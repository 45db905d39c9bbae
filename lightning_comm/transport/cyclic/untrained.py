"""Parameters that no stage has, and that the module may change itself: those of a teacher, a momentum encoder."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.content import content, differ
from lightning_comm.transport.cyclic.buffers import average_buffers
from lightning_comm.transport.recording import Recorder


class UntrainedParameters:
    """Averages the parameters of no stage that have changed on some rank since all ranks were equal.

    Args:
        module: The model.
        trained: Its parameters that stages have.

    Note:
        *Communication.* A byte for each parameter, by an all-gather, so that all ranks know what has changed on any;
        and these are averaged as buffers are. On a CUDA device the host waits once for the bytes, and not for each
        parameter.

    """

    def __init__(self, module: nn.Module, trained: Iterable[Tensor]) -> None:
        self._module = module
        self._trained = {id(parameter) for parameter in trained}
        self._noted = {name: content(parameter) for name, parameter in self._parameters().items()}

    def leave_out(self, trained: Iterable[Tensor]) -> None:
        """Treat these as the trained ones, and all others as those that no stage has."""
        self._trained = {id(parameter) for parameter in trained}
        others = self._parameters()
        self._noted |= {name: content(each) for name, each in others.items() if name not in self._noted}

    @torch.no_grad()
    def bring_together(self, recorder: Recorder) -> None:
        """Average those that have changed on any rank; floating-point ones, and others are those of rank 0."""
        parameters = self._parameters()  # looked up each time: the module may have replaced them
        if not parameters:
            return
        device = next(iter(parameters.values())).device
        moved = torch.stack([self._moved(name, parameter).to(device) for name, parameter in parameters.items()])
        rows, pending = recorder.all_gather(moved.to(torch.uint8), "control")
        pending.wait()
        anywhere = [name for name, each in zip(parameters, rows.amax(0).tolist(), strict=True) if each]
        moved_only = nn.Module()
        for number, name in enumerate(anywhere):
            moved_only.register_buffer(str(number), parameters[name])
        average_buffers(moved_only, recorder)
        self._noted |= {name: content(parameters[name]) for name in anywhere}

    def _parameters(self) -> dict[str, Tensor]:
        named = self._module.named_parameters()
        return {name: parameter.detach() for name, parameter in named if id(parameter) not in self._trained}

    def _moved(self, name: str, parameter: Tensor) -> Tensor:
        if name not in self._noted:
            return torch.ones((), dtype=torch.bool, device=parameter.device)
        return differ(self._noted[name], content(parameter))
