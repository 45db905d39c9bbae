"""Masks that are chosen elsewhere: by a function, in a file, or in the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_comm.ondevice.pruning.base import NOW, Masks, Pruning, PruningContext, checked_masks


@dataclass(frozen=True)
class MaskFunction(Pruning):
    """Masks that a function of the user returns. Rank 0 alone calls it; the other ranks receive its masks.

    Args:
        function: Takes the model and returns masks by parameter name: tensors of ``bool``, ``True`` where a weight is
            kept. It must not communicate, since no other rank calls it.

    Raises:
        ValueError: If the masks do not fit the model, or keep nothing of a parameter.

    Note:
        *Communication.* None; the strategy broadcasts the masks of rank 0.

        *Memory.* What the function makes, and a byte a weight for the masks.

    Example:
        >>> def keep_first_row(module):
        ...     mask = torch.zeros_like(module.weight, dtype=torch.bool)
        ...     mask[0] = True
        ...     return {"weight": mask}
        >>> MaskFunction(keep_first_row).masks(nn.Linear(2, 2))["weight"].tolist()
        [[True, True], [False, False]]

    """

    function: Callable[[nn.Module], Mapping[str, Tensor]] = field(repr=False)  # its repr would be an address

    @override
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        return checked_masks(self.function(module), module, "MaskFunction")


@dataclass(frozen=True)
class MaskFile(Pruning):
    """Masks from a file that ``torch.save`` has written. Rank 0 alone reads it; the other ranks receive its masks.

    Args:
        path: The file, needed on the host of rank 0 alone: a dictionary of tensors of ``bool`` by parameter name,
            ``True`` where a weight is kept.

    Raises:
        ValueError: If the file is missing or damaged, or if its masks do not fit the model.

    Note:
        *Communication.* None; the strategy broadcasts the masks of rank 0.

        *Memory.* A byte a weight for the masks.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/masks.pt"
        >>> torch.save({"weight": torch.tensor([[True, False]])}, path)
        >>> MaskFile(path).masks(nn.Linear(2, 1))["weight"].tolist()
        [[True, False]]

    """

    path: str

    @override
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        if not Path(self.path).is_file():
            raise ValueError(f"MaskFile: `path` must be a file that torch.save has written; there is no {self.path!r}.")
        try:
            masks = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever torch and pickle make of a damaged file
            raise ValueError(
                f"MaskFile: `path`={self.path!r} cannot be read ({type(error).__name__}), so it is damaged or holds "
                "more than tensors. Write a dictionary of tensors of torch.bool by parameter name with torch.save."
            ) from error
        return checked_masks(masks, module, f"MaskFile({self.path!r})")


@dataclass(frozen=True)
class ModulePruning(Pruning):
    """The masks that ``torch.nn.utils.prune``, or Lightning's ``ModelPruning``, has left in the model.

    A parameter ``weight_orig`` is pruned as the buffer ``weight_mask`` beside it says. Whether a weight is zero says
    nothing: weight decay moves pruned ones, and trained ones may be zero.

    Masks may change during training, as under ``ModelPruning``. Every change, on any rank, is noticed in the next step;
    in the step after that gradients are sent in full, and ranks read and compare their masks. Nothing is lost when
    masks shrink; when masks grow, the gradients of the weights that came back are missing in one step.

    A weight that several modules share keeps an entry if any of them keeps it; all entries if one uses it unpruned.

    Raises:
        ValueError: If no module has such a buffer.

    Note:
        *Communication.* In each step two bytes besides the gradients: whether this rank's masks have changed, and
        whether it had gradients outside them, which the model's own masks should have set to zero.

        *Memory.* A byte a weight for the masks, beside those in the model.

        *From dense.* A layer that is to be pruned later needs a mask that keeps all of it when training starts:
        ``torch.nn.utils.prune.identity(layer, "weight")``.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = nn.Linear(2, 1)
        >>> _ = prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
        >>> ModulePruning().masks(layer)["weight_orig"].tolist()
        [[True, False]]

    """

    is_watched: ClassVar[bool] = True

    @override
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        found, useless = masks_in(module)
        context.warn(
            useless,
            "ModulePruning: the mask of {names} leaves out no gradients, since another module uses the same weight "
            "unpruned. Prune the weight in each module that shares it, with the same mask.",
        )
        if not found:
            raise ValueError(
                "ModulePruning: it reads the masks that torch.nn.utils.prune leaves in a model, and this one has none. "
                "Prune before training, if only by torch.nn.utils.prune.identity, or use MagnitudePruning."
            )
        return checked_masks(found, module, "ModulePruning")

    @override
    def present(self, module: nn.Module) -> Masks:
        return {name: mask for name, mask in masks_in(module)[0].items() if mask.numel()}


def masks_in(module: nn.Module) -> tuple[Masks, list[str]]:
    """Return the masks that ``torch.nn.utils.prune`` has left in a model, by the first names of parameters.

    Each is the union over the modules that use the parameter. Also return the names of masks without effect, since
    another module uses the parameter unpruned.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    uses: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found: Masks = {}
    useless = []
    for name, parameter in module.named_parameters():
        own = [each for each in uses[id(parameter)] if _mask_name(each) in buffers]
        if own:
            found[name] = torch.stack([buffers[_mask_name(each)] != 0 for each in own]).any(0)
        if own and len(own) < len(uses[id(parameter)]):
            found[name].fill_(True)
            useless += own
    return found, useless


def _mask_name(parameter: str) -> str:
    return f"{parameter.removesuffix('_orig')}_mask" if parameter.endswith("_orig") else ""
