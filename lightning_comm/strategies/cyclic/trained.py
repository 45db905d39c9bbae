"""The parameters that are trained: whether the stages still have exactly these, and the error if not."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn import Parameter

from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.strategies.cyclic import step_errors


def names_of(module: nn.Module, trained: Sequence[Parameter]) -> list[str]:
    """Return the names of the trained parameters of a module, in its order."""
    ids = {id(each) for each in trained}
    return [name for name, each in module.named_parameters() if id(each) in ids]


def are_of(stages: Sequence[Stage], module: nn.Module, trained: Sequence[Parameter]) -> bool:
    """Whether stages have the parameters that are trained, all of them and no others."""
    return {name for stage in stages for name in stage.parameters} == set(names_of(module, trained))


def check(stages: Sequence[Stage], module: nn.Module, trained: Sequence[Parameter], step: int) -> None:
    """Refuse new stages that do not have the parameters trained on this rank, now and when the forward began.

    Raises:
        RuntimeError: If they do not.

    """
    if not are_of(stages, module, trained):
        raise others(stages, module, trained, step)
    live = {id(each) for each in module.parameters()}
    if old := [f"number {number} of the optimizer" for number, each in enumerate(trained) if id(each) not in live]:
        raise step_errors.replaced_parameters(step, old)


def others(stages: Sequence[Stage], module: nn.Module, trained: Sequence[Parameter], step: int) -> RuntimeError:
    """Return the error of parameters that began, or ceased, to be trained since the model was cut."""
    before, now = [name for stage in stages for name in stage.parameters], names_of(module, trained)
    frozen, new = [each for each in before if each not in now], [each for each in now if each not in before]
    return step_errors.other_parameters(step, len(before), len(trained), frozen, new)


def without_gradient(parameters: Mapping[str, Parameter], module: nn.Module, step: int) -> RuntimeError | None:
    """Return the error of parameters of a stage that have no gradient, unless it is that they are not trained now."""
    without = {name: each for name, each in parameters.items() if each.grad is None}
    live = {id(each) for each in module.parameters()}
    if replaced := [name for name, each in without.items() if id(each) not in live]:
        return step_errors.replaced_parameters(step, replaced)
    if all(each.requires_grad for each in without.values()):
        return step_errors.without_gradient(step, list(without))
    return None
