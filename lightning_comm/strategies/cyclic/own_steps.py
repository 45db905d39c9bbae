"""A warning of parameters that the module trains itself, and that the strategy's optimizer does not have."""

from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_comm.ondevice.content import content, differ
from lightning_comm.strategies.cyclic.settings import WHERE


class OwnSteps:
    """Finds parameters that get a gradient and change, and that no stage has; warns once.

    That excludes a teacher that changes without a gradient, and a layer that gets a gradient and does not change.

    Args:
        module: The model.
        trained: Parameters that the strategy's optimizer has.

    """

    def __init__(self, module: nn.Module, trained: Sequence[Tensor]) -> None:
        ids = {id(each) for each in trained}
        self._parameters = {
            name: each for name, each in module.named_parameters() if each.requires_grad and id(each) not in ids
        }
        self._had: dict[str, Tensor] = {}  # the content of each before its first gradient was used
        self._writes: dict[str, int] = {}  # how often each had been written to when it was last compared
        self._handles: dict[str, RemovableHandle] = {}
        for name, parameter in self._parameters.items():
            note = partial(self._note, name)
            handle = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
            self._handles[name] = handle

    def _note(self, name: str, parameter: Tensor) -> None:
        self._had[name], self._writes[name] = content(parameter), parameter._version
        self._handles.pop(name).remove()

    def look(self) -> None:
        """Warn if a parameter has changed since it had a gradient; between two steps."""
        if not self._writes:
            return
        parameters = self._parameters.items()
        written = [name for name, each in parameters if each._version > self._writes.get(name, each._version)]
        self._writes |= {name: self._parameters[name]._version for name in written}
        # compared by content, since callbacks exchange weights for a validation, and restore them
        if not written:
            return
        differences = [differ(self._had[name], content(self._parameters[name])) for name in written]
        device = differences[0].device
        answers = torch.stack([each.to(device) for each in differences]).tolist()  # the host waits once for all
        if found := [name for name, each in zip(written, answers, strict=True) if each]:
            self.close()
            warn(found)

    def close(self) -> None:
        """Stop looking."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._writes.clear()


def warn(names: Sequence[str]) -> None:
    """Warn that each rank trains these by its own gradient."""
    rank_zero_warn(
        f"{WHERE}: {len(names)} parameter(s) get a gradient and are changed, and no group of the optimizer that "
        f"`configure_optimizers` returns has them: {', '.join(names[:8])}. Each rank changes its own copy by its own "
        "gradient, and copies are averaged only where ranks meet: for a validation, a checkpoint and at the end. Give "
        "them to that optimizer, as a parameter group with settings of their own if need be; what is not to be trained "
        "needs no gradient: `requires_grad_(False)`."
    )
