"""Second derivatives of a loss, or an error that names the operation without one.

Torch's own errors do not say what to do, nor, for some operations, which one it is. And the second derivative of a
custom ``torch.autograd.Function`` may be wrong without any error: if its ``backward`` leaves autograd, by
``@once_differentiable``, ``detach`` or numpy, its part is missing. So custom functions are checked.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

_NOT_IMPLEMENTED = re.compile(r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward\w*)?'? is not implemented")
_FUSED = ("scaled_dot_product", "attention")
_LENGTH = 240  # characters of torch's message
_PLAIN = (int, float, str, type(None))  # attributes that leave a backward linear, such as a factor


class Functions:
    """Checks the custom functions of a loss while their backward runs.

    The gradient at the end of a loss is a constant, and the result of a backward that leaves autograd looks like one as
    well. So the loss's gradient is made to depend on `seed`: a result that does not depend on it has left autograd.

    Args:
        value: The loss.
        rows: The parameters by which the loss is differentiated.
        seed: The gradient of the loss; ``None`` for first derivatives only.

    Attributes:
        begun: The names of those whose backward has begun and not ended.
        broken: The names of those whose backward leaves autograd.

    """

    def __init__(self, value: Tensor, rows: list[nn.Parameter], seed: Tensor | None) -> None:
        self.begun: list[str] = []
        self.broken: list[str] = []
        self._rows, self._seed = {id(row) for row in rows}, seed
        functions = [node for node in _nodes([value]) if isinstance(node, BackwardCFunction)]
        self._handles = [handle for node in functions for handle in self._watch(node)]

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, node: Any) -> Iterator[Any]:
        name = type(node).__name__.removesuffix("Backward")

        def begin(_: Any) -> None:
            self.begun.append(name)

        def end(into: tuple[Tensor | None, ...], out_of: tuple[Tensor | None, ...]) -> None:
            # a gradient of zeros may be a constant; any other one should depend on the incoming gradients
            ends = any(each is not None and not _can_go_on(each) and bool(each.any()) for each in into)
            if self._seed is not None and ends and self._is_asked(node, out_of):
                self.broken.append(name)
            self.begun.remove(name)

        yield node.register_prehook(begin)
        yield node.register_hook(end)

    def _is_asked(self, node: Any, out_of: tuple[Tensor | None, ...]) -> bool:
        """Whether the result of a backward must be differentiated: it depends, or may depend, on the rows.

        It may depend on them if the function has saved something. A function without saved values, such as a
        straight-through estimate, is linear in its incoming gradients.
        """
        came_in = [each for each in out_of if each is not None and each.requires_grad]
        if not came_in:
            return False  # after another end of autograd, which is refused or correct
        if node.saved_tensors or any(not isinstance(each, _PLAIN) for each in vars(node).values()):
            return True
        return any(id(getattr(each, "variable", None)) in self._rows for each in _nodes(came_in))


def derivatives(value: Tensor, rows: list[nn.Parameter], *, graph: bool = False) -> list[Tensor]:
    """Return the derivatives of a scalar by the rows; zeros for rows on which it does not depend.

    Args:
        value: The scalar.
        rows: The parameters.
        graph: Whether the derivatives will be differentiated again.

    Raises:
        ValueError: If that is impossible; names the operation if it is known.

    """
    seed = torch.ones_like(value, requires_grad=True) if graph else None
    functions = Functions(value, rows, seed)
    try:
        # not `backward`, which would add to the gradients that the model has and start DDP's hooks
        found = torch.autograd.grad(value, rows, seed, create_graph=graph, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(_refusal(functions.begun[-1:], str(error))) from error
    finally:
        functions.end()
    if graph and functions.broken:
        raise ValueError(_refusal(functions.broken[:1], ""))
    return [torch.zeros_like(row) if each is None else each for row, each in zip(rows, found, strict=True)]


@contextmanager
def kernels_with_second_derivatives(module: nn.Module) -> Iterator[None]:
    """Use kernels that can be differentiated twice: for attention, and on CUDA for recurrent layers."""
    with ExitStack() as stack:
        stack.enter_context(nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH))
        recurrent = (each for each in module.modules() if isinstance(each, nn.RNNBase))
        # not `is_available`: it calls the driver, after which a forked process cannot use CUDA
        if any(parameter.is_cuda for each in recurrent for parameter in each.parameters()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _nodes(values: list[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph behind values: operations, and parameters (as the `variable` of their nodes)."""
    waiting: list[Any] = [each.grad_fn for each in values]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [each for each, _ in node.next_functions]


def _can_go_on(gradient: Tensor) -> bool:
    """Whether a gradient can be differentiated; torch marks those that cannot by a node that raises an error."""
    return gradient.requires_grad and type(gradient.grad_fn).__name__ != "Error"


def _refusal(names: list[str], said: str) -> str:
    found = _NOT_IMPLEMENTED.search(said)
    operation = names[0] if names else found[1] if found else None
    where = "" if operation is None else f" because of {operation}"
    torch_says = f" torch says: {said.splitlines()[0][:_LENGTH].rstrip('.')}." if said else ""
    return (
        f"GraSPPruning: the scores need second derivatives of the loss by the weights, and there are none{where}."
        f"{torch_says} Give `GraSPPruning(loss=...)` a loss without that operation, {_cure(operation, names)}or use "
        "another pruning, such as MagnitudePruning."
    )


def _cure(operation: str | None, names: list[str]) -> str:
    if operation is not None and any(each in operation.lower() for each in _FUSED):
        return "run that attention under `sdpa_kernel(SDPBackend.MATH)`, "
    if names == ["CompiledFunction"]:
        return "such as that of the model before torch.compile, "
    if names and names != ["CheckpointFunction"]:
        return "let its `backward`, if it is your own, be made of operations that autograd follows, "
    return ""
