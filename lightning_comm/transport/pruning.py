"""Which weights are pruned: masks, where they come from, and how ranks agree on them.

A mask has the shape of a parameter and is True where a weight is kept. Masks are chosen on rank 0 and broadcast, so no
tie, no random number and no sample that one rank alone has seen can make them differ; ranks then compare a fingerprint
of all their bits, and disagreement is an error on all of them.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_comm.transport.recording import Recorder

Masks = dict[str, Tensor]

_SCOPES = ("global", "layer", "erk")


class Pruning(ABC):
    """Chooses masks; a frozen value."""

    @abstractmethod
    def masks(self, module: nn.Module) -> Masks:
        """Return a mask for each parameter that is pruned, by name. Asked on rank 0."""


@dataclass(frozen=True)
class MagnitudePruning(Pruning):
    """Prune the weights with the smallest magnitudes.

    Args:
        sparsity: Share of the weights that are pruned, of those that may be: at least 0 and below 1.
        scope: ``"global"``: the smallest of all. ``"layer"``: the same share of each parameter. ``"erk"``: a share of
            each parameter that falls with its size (Erdős-Rényi kernels), so that small layers keep more.
        skip: Names of parameters that are never pruned; ``*`` stands for anything. Parameters with less than two
            dimensions (biases, norms) and embeddings never are.

    Raises:
        ValueError: If an argument is out of range, or if there is nothing left to prune.

    Note:
        *Communication.* None; whoever installs the masks broadcasts them.

        *Global scope.* Keeps at least one weight of each parameter, since a layer without any passes nothing on.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.1, -0.4, 0.3, -0.2]]))
        >>> MagnitudePruning(sparsity=0.5).masks(layer)["weight"].tolist()
        [[False, True, True, False]]

    """

    sparsity: float = 0.8
    scope: Literal["global", "layer", "erk"] = "global"
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check_sparsity("MagnitudePruning", self.sparsity)
        if self.scope not in _SCOPES:
            raise ValueError(
                f"MagnitudePruning: `scope` must be one of {', '.join(map(repr, _SCOPES))}; got {self.scope!r}."
            )
        object.__setattr__(self, "skip", tuple(self.skip))

    @override
    def masks(self, module: nn.Module) -> Masks:
        weights = prunable(module, self.skip, "MagnitudePruning")
        return keep_largest(
            {name: weight.detach().abs() for name, weight in weights.items()}, self.sparsity, self.scope
        )


@dataclass(frozen=True)
class MaskFunction(Pruning):
    """Masks that a function of the user's returns.

    Args:
        function: Takes the model and returns masks by parameter name.

    """

    function: Callable[[nn.Module], Mapping[str, Tensor]]

    @override
    def masks(self, module: nn.Module) -> Masks:
        return checked_masks(self.function(module), module, "MaskFunction")


@dataclass(frozen=True)
class MaskFile(Pruning):
    """Masks from a file that ``torch.save`` has written: a dictionary of tensors of ``bool``, by parameter name.

    Args:
        path: The file, on rank 0.

    """

    path: str

    @override
    def masks(self, module: nn.Module) -> Masks:
        if not Path(self.path).is_file():
            raise ValueError(f"MaskFile: `path` must be a file that torch.save has written; there is no {self.path!r}.")
        return checked_masks(
            torch.load(self.path, weights_only=True, map_location="cpu"), module, f"MaskFile({self.path!r})"
        )


@dataclass(frozen=True)
class ModulePruning(Pruning):
    """The masks that ``torch.nn.utils.prune``, or Lightning's ``ModelPruning``, has left in the model.

    A parameter ``weight_orig`` is pruned as the buffer ``weight_mask`` beside it says. Whether a weight is zero says
    nothing: weight decay moves pruned ones, and trained ones may be zero.

    Raises:
        ValueError: If no module has such a buffer.

    """

    @override
    def masks(self, module: nn.Module) -> Masks:
        buffers = dict(module.named_buffers())
        found = {
            name: buffers[f"{name.removesuffix('_orig')}_mask"] != 0
            for name, _ in module.named_parameters()
            if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in buffers
        }
        if not found:
            raise ValueError(
                "ModulePruning: it reads the masks that torch.nn.utils.prune leaves in a model, and this one has none. "
                "Prune before training, or use MagnitudePruning."
            )
        return checked_masks(found, module, "ModulePruning")


def prunable(module: nn.Module, skip: Sequence[str], where: str) -> dict[str, nn.Parameter]:
    """Return the parameters that may be pruned, by name: trained ones with two dimensions or more, no embeddings."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1)
            raise ValueError(
                f"{where}: `skip` must name parameters of the model, and {pattern!r} is none."
                + (f" Did you mean {near[0]!r}?" if near else f" Its parameters are {', '.join(names[:5])}, …")
            )
    embedded = {id(each.weight) for each in module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))}
    left = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and parameter.dim() >= 2
        and parameter.is_floating_point()
        and id(parameter) not in embedded
        and not any(fnmatch(name, pattern) for pattern in skip)
    }
    if not left:
        raise ValueError(
            f"{where}: no parameter is left to prune. Those with two dimensions or more that are trained, are no "
            "embeddings and are not in `skip` can be."
        )
    return left


def keep_largest(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> Masks:
    """Return masks that keep the entries with the largest scores; of equal ones the first.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "layer").items()}
        {'a': [False, True], 'b': [False, True]}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "global").items()}
        {'a': [False, True], 'b': [False, True]}

    """
    if scope == "global":
        return _keep_largest_of_all(scores, sparsity)
    shares = dict.fromkeys(scores, 1 - sparsity) if scope == "layer" else erk_shares(scores, sparsity)
    return {name: _largest(score, max(1, round(shares[name] * score.numel()))) for name, score in scores.items()}


def _keep_largest_of_all(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    rows = [score.reshape(-1).float() for score in scores.values()]
    total = sum(row.numel() for row in rows)
    kept = max(len(rows), round((1 - sparsity) * total))
    everything = torch.cat(rows)
    firsts = torch.tensor([int(row.argmax()) for row in rows])
    starts = torch.tensor([0, *[row.numel() for row in rows[:-1]]]).cumsum(0)
    everything[firsts + starts] = torch.inf  # one of each layer at least
    mask = _largest(everything, kept)
    parts = torch.split(mask, [row.numel() for row in rows])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def erk_shares(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the kept share of each parameter: in proportion to the sum of its dimensions over their product.

    No share is above 1; what a small layer cannot take is spread over the others.
    """
    total = sum(score.numel() for score in scores.values())
    raw = {name: sum(score.shape) / math.prod(score.shape) for name, score in scores.items()}
    full: set[str] = set()
    while True:
        budget = (1 - sparsity) * total - sum(scores[name].numel() for name in full)
        scale = budget / sum(raw[name] * scores[name].numel() for name in scores if name not in full)
        over = {name for name in scores if name not in full and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in scores}
        full |= over


def _largest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def _check_sparsity(where: str, sparsity: object) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if number and 1 < sparsity <= 100:  # type: ignore[operator]
        raise ValueError(
            f"{where}: `sparsity` is a share from 0 to 1; got {sparsity!r}. For {sparsity} % write {sparsity / 100:g}."  # type: ignore[operator]
        )
    if not number or not 0 <= sparsity < 1:  # type: ignore[operator]
        raise ValueError(
            f"{where}: `sparsity` is the share of weights that are pruned, so it must be >= 0 and < 1; got "
            f"{sparsity!r}. 0.8 keeps one weight in five."
        )


def checked_masks(masks: object, module: nn.Module, where: str) -> Masks:
    """Return masks that a user gave, if each fits its parameter.

    Raises:
        ValueError: If one does not; the message names it.

    """
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"{where}: masks must be a dictionary of tensors by parameter name, not empty; got {masks!r}.")
    parameters = dict(module.named_parameters())
    sparse = {
        f"{name}.weight"
        for name, each in module.named_modules()
        if isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.sparse
    }
    for name, mask in masks.items():
        if name not in parameters:
            near = get_close_matches(str(name), parameters, n=1)
            raise ValueError(
                f"{where}: there is a mask for {name!r}, which is no parameter of the model."
                + (f" Did you mean {near[0]!r}?" if near else " Names are those of `named_parameters()`.")
            )
        parameter = parameters[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{where}: the mask of {name!r} must be a tensor of torch.bool, True where a weight is kept; got "
                f"{kind}. `mask != 0` makes one of numbers."
            )
        if mask.shape != parameter.shape:
            raise ValueError(
                f"{where}: the mask of {name!r} must have the parameter's shape {tuple(parameter.shape)}; got "
                f"{tuple(mask.shape)}. It may belong to another architecture."
            )
        if not parameter.requires_grad:
            raise ValueError(f"{where}: {name!r} is frozen, so it has no gradient to leave out. Drop its mask.")
        if name in sparse:
            raise ValueError(
                f"{where}: {name!r} has sparse gradients, which DDP sends by themselves. Drop its mask, or build the "
                "embedding with sparse=False."
            )
    _check_something_is_left(masks, where)
    return {str(name): mask.detach() for name, mask in masks.items()}


def _check_something_is_left(masks: Mapping[str, Tensor], where: str) -> None:
    for name, mask in masks.items():
        if not bool(mask.any()):
            raise ValueError(
                f"{where}: the mask of {name!r} keeps nothing, so that parameter would be zero for ever. True is for "
                "weights that are kept; `~mask` turns a mask round."
            )


def agree(masks: Masks | None, problem: str | None, module: nn.Module, recorder: Recorder) -> Masks:
    """Give every rank the masks of rank 0, and check that all have them.

    Args:
        masks: Those of rank 0; looked at there alone.
        problem: Why rank 0 has none. Raised on all ranks.
        module: The model, the same on all ranks.
        recorder: Sends and records.

    Raises:
        ValueError: On all ranks, if rank 0 has a problem.
        RuntimeError: On all ranks, if they do not have the same masks.

    Note:
        *Communication.* Two small messages and one broadcast of a bit a masked weight.

    """
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    names = list(parameters)
    said = torch.zeros(2000, dtype=torch.uint8, device=device)
    if recorder.rank == 0 and problem is not None:
        text = problem.encode()[: said.numel()]
        said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    recorder.broadcast(said, "masks").wait()
    if bool(said.any()):
        raise ValueError(bytes(said[said != 0].tolist()).decode(errors="replace"))
    has_mask = torch.tensor([masks is not None and name in masks for name in names], dtype=torch.uint8, device=device)
    recorder.broadcast(has_mask, "masks").wait()
    agreed: Masks = {}
    for name, has in zip(names, has_mask.tolist(), strict=True):
        if has:
            numel = parameters[name].numel()
            own = masks[name].reshape(-1).to(device) if masks is not None and recorder.rank == 0 else None
            bits = pack_bits(own) if own is not None else torch.empty(-(-numel // 8), dtype=torch.uint8, device=device)
            recorder.broadcast(bits, "masks").wait()
            agreed[name] = unpack_bits(bits, numel).view(parameters[name].shape)
    check_agreement(agreed, device, recorder)
    return agreed


def check_agreement(masks: Masks, device: torch.device, recorder: Recorder) -> None:
    """Compare the masks of all ranks, bit by bit.

    Raises:
        RuntimeError: On all ranks, if they differ.

    Note:
        *Communication.* One all-gather of 8 bytes.

    """
    mine = torch.tensor([fingerprint(masks)], dtype=torch.int64, device=device)
    rows, pending = recorder.all_gather(mine, "masks")
    pending.wait()
    prints = rows.flatten().tolist()
    if len(set(prints)) > 1:
        other = next(rank for rank, each in enumerate(prints) if each != prints[0])
        raise RuntimeError(
            f"SparseMask: ranks must have the same masks, and rank {other} has others than rank 0. Give masks that "
            "depend on nothing that is rank's own: its data, its random state, or weights that were changed there."
        )


def fingerprint(masks: Masks) -> int:
    """Return 63 bits that stand for the names, shapes and bits of the masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name}{tuple(mask.shape)}".encode())
        digest.update(bytes(pack_bits(mask.reshape(-1)).cpu().numpy()))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def pack_bits(row: Tensor) -> Tensor:
    """Return a row of bits, eight in a byte.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]

    """
    padded = torch.zeros(-(-row.numel() // 8) * 8, dtype=torch.uint8, device=row.device)
    padded[: row.numel()] = row
    powers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=row.device)
    return (padded.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Return the row that :func:`pack_bits` packed.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
        [True, False, True]

    """
    powers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=packed.device)
    return (packed.view(-1, 1) & powers).ne(0).view(-1)[:numel]
