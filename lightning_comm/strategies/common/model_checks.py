"""Refusals of models that are not complete before training, or have nothing to train."""

from collections.abc import Iterable, Iterator

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

_NAMED = 6  # as many names are given in a message


def lazy_names(module: nn.Module | None) -> list[str]:
    """Return the names of parameters and buffers whose shapes are not known yet."""
    named = [] if module is None else [*module.named_parameters(), *module.named_buffers()]
    return [name for name, each in named if is_lazy(each)]


def lazy_problems(module: LightningModule) -> Iterator[str]:
    """Yield parameters and buffers whose shapes are not known yet."""
    lazy = lazy_names(module)
    if lazy:
        parts = {name.rpartition(".")[0] for name in lazy}
        kinds = sorted({type(part).__name__ for name, part in module.named_modules() if name in parts})
        more = ", …" if len(lazy) > _NAMED else ""
        yield (
            f"{len(lazy)} parameter(s) and buffer(s) of {', '.join(kinds)} have no shape before a first forward, and "
            f"ranks compare and share them before training: {', '.join(map(repr, lazy[:_NAMED]))}{more}. Run one batch "
            "through the model earlier, as in `configure_model` of the LightningModule "
            "(`self.net(torch.zeros(1, 32))`), or give the sizes (nn.Linear in place of nn.LazyLinear)."
        )


def trained_problems(module: LightningModule, optimizers: Iterable[Optimizer] = ()) -> Iterator[str]:
    """Yield a problem if no parameter of the model, or of its optimizers, is trained."""
    grouped = (each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"])
    if not any(each.requires_grad for each in (*module.parameters(), *grouped)):
        yield (
            f"no parameter of {type(module).__name__} requires a gradient, so there is nothing to train; DDP refuses "
            "such a model as well. Check `requires_grad`; to run the model through data as it is, use one process "
            "(`Trainer(strategy='auto', devices=1)`)."
        )


def has_no_optimizer(optimizers: list[Optimizer]) -> bool:
    """Whether ``configure_optimizers`` returned none, for which Lightning puts one without groups in place."""
    return not any(optimizer.param_groups for optimizer in optimizers)


def no_optimizer(module: LightningModule, why: str) -> str:
    """Return the refusal of a module without an optimizer; ``why`` says what needs one."""
    trains = any(each.requires_grad for each in module.parameters())
    other = "use DDPStrategy" if trains else "use one process (`Trainer(strategy='auto', devices=1)`)"
    return (
        f"`configure_optimizers` returned no optimizer, so nothing is trained and {why}. Return an optimizer; or "
        f"return None and {other}, which runs such a module as it is."
    )
