"""``lightning-comm fit``, ``validate``, ``test`` and ``predict``: Lightning's command line, which knows our names."""

import atexit
import difflib
import sys
from collections.abc import Sequence

import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

import lightning_comm  # noqa: F401  # registers the strategies


def fit(args: Sequence[str]) -> None:
    """Train a model."""
    _run("fit", args)


def validate(args: Sequence[str]) -> None:
    """Measure a trained model on the validation data."""
    _run("validate", args)


def test(args: Sequence[str]) -> None:
    """Measure a trained model on the test data."""
    _run("test", args)


def predict(args: Sequence[str]) -> None:
    """Let a trained model answer."""
    _run("predict", args)


class CommandLine(LightningCLI):
    """Lightning's command line, which says at once and in one sentence that a strategy's name is wrong."""

    @override
    def before_instantiate_classes(self) -> None:
        strategy = self.config[self.subcommand].trainer.strategy
        if isinstance(strategy, str) and (problem := strategy_problem(strategy)):
            self.parser.error(problem)


def strategy_problem(name: str) -> str | None:
    """Return what is wrong with the name of a strategy, or ``None``."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    if name.lower() in known:  # the Trainer looks names up in lower case
        return None
    if "." in name:
        return (
            f"trainer: `strategy` must be a name or a class with arguments; got {name!r}, a class alone. Write "
            f"--trainer.strategy.class_path={name}."
        )
    near = difflib.get_close_matches(name.lower(), known, n=3)
    return f"trainer: `strategy` must be a name that Lightning knows; got {name!r}. " + (
        f"Near it are {', '.join(near)}." if near else f"Known are {', '.join(known)}."
    )


def _run(subcommand: str, args: Sequence[str]) -> None:
    line = [subcommand, *args]
    atexit.register(_leave_process_group)
    CommandLine(
        # Lightning warns of words that differ from those of the process, so where they are the same it reads them.
        args=None if line == sys.argv[1:] else line,
        # The same command gives the same run, and a run may go on in the folder where it began.
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )


def _leave_process_group() -> None:
    # Lightning leaves it open with gloo, and then some runs that went well abort while Python shuts down.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
