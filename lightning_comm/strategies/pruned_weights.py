"""Keeps pruned weights at zero: once in the optimizer's state, and in the weights after every step."""

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_comm.strategies.lightning_internals import weight_average_of
from lightning_comm.transport.compression.sparse_mask import SparseMask, SparseMaskCodec
from lightning_comm.transport.pruning import Masks, agree, check_agreement, checked_masks
from lightning_comm.transport.recording import Recorder

_WHERE = "CompressedDDPStrategy"


class PrunedWeights:
    """The pruned weights of a run.

    Args:
        module: The model.
        codec: Sends gradients, and saves the masks.
        settings: Where masks come from.
        recorder: Sends and records.

    """

    def __init__(
        self, module: LightningModule, codec: SparseMaskCodec, settings: SparseMask, recorder: Recorder
    ) -> None:
        self._module = module
        self._codec = codec
        self._settings = settings
        self._recorder = recorder
        self._pruned: list[tuple[Tensor, Tensor]] = []  # a parameter, and True where it is zero

    def start(self, trainer: Trainer, optimizers: Iterable[Optimizer]) -> None:
        """Choose the masks, or take those of the run that is resumed, and set to zero what they prune.

        Raises:
            ValueError: On all ranks, if masks cannot be had or do not fit the model.

        """
        parameters = dict(self._module.named_parameters())
        if self._codec.masks:
            masks = checked_masks(self._codec.masks, self._module, "SparseMask, from the checkpoint")
            masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
            check_agreement(masks, self._module.device, self._recorder)
        else:
            masks = self._choose()
        self._codec.install(masks, parameters.items())
        self._pruned = [(parameters[name].detach(), ~mask) for name, mask in masks.items()]
        self.keep_at_zero()
        by_parameter = {id(parameters[name]): mask for name, mask in masks.items()}
        for optimizer in optimizers:
            _clear_state(optimizer, by_parameter)
        _clear_averages(trainer, masks)

    def _choose(self) -> Masks:
        masks, problem = None, None
        if self._recorder.rank == 0:
            try:
                masks = self._settings.pruning.masks(self._module)
            except Exception as error:  # whatever it is, the others wait for word of it
                problem = str(error) or type(error).__name__  # an empty word would pass for none
        return agree(masks, problem, self._module, self._recorder)

    @torch.no_grad()
    def keep_at_zero(self) -> None:
        """Set pruned weights to zero, where an optimizer that mixes entries may have moved them."""
        for parameter, pruned in self._pruned:
            parameter.masked_fill_(pruned, 0)


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers under which pruned weights cannot be kept at zero."""
    for optimizer in optimizers:
        if isinstance(optimizer, (LBFGS, SparseAdam)):
            why = (
                "keeps a history in which all entries are mixed"
                if isinstance(optimizer, LBFGS)
                else "wants sparse gradients, which cannot be masked"
            )
            raise MisconfigurationException(
                f"{_WHERE}: SparseMask cannot keep pruned weights at zero under {type(optimizer).__name__}, which "
                f"{why}. Use another optimizer, such as AdamW or SGD."
            )


@torch.no_grad()
def _clear_state(optimizer: Optimizer, masks: dict[int, Tensor]) -> None:
    """Momenta of before the pruning would bring pruned weights back to life."""
    for parameter, state in optimizer.state.items():
        mask = masks.get(id(parameter))
        for value in state.values() if mask is not None else ():
            if isinstance(value, Tensor) and mask is not None and value.shape == mask.shape:
                value.masked_fill_(~mask, 0)


@torch.no_grad()
def _clear_averages(trainer: Trainer, masks: Masks) -> None:
    """Copies that average the weights over time follow them; here they are pruned along."""
    for callback in getattr(trainer, "callbacks", []):
        average = weight_average_of(callback)
        for name, parameter in average.named_parameters() if average is not None else ():
            mask = masks.get(name.removeprefix("module."))
            if mask is not None:
                parameter.masked_fill_(~mask.to(parameter.device), 0)
