"""``lightning-comm fit``, ``validate``, ``test`` and ``predict``: Lightning's command line, with our strategies."""

import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

import lightning_comm  # noqa: F401  # registers the strategies
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.cli.fit.user_modules import Parser, search_beside_configs
from lightning_comm.lab.cluster import LAB_VARIABLE
from lightning_comm.lab.device.settings import SPEED_VARIABLE
from lightning_comm.transport.group_ends import leave_group_at_exit


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


class SavedConfig(SaveConfigCallback):
    """Lightning's record of a run's config, which is not written over a config that the run reads.

    Without a logger Lightning writes ``config.yaml`` into the working folder, where the user's own may be.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        target = os.path.realpath(os.path.join(trainer.log_dir or "", self.config_filename))
        read = self.config.get("config") or []  # of the subcommand
        is_read = target in [os.path.realpath(str(path.absolute)) for path in read]
        self.already_saved |= trainer.strategy.broadcast(is_read)  # as rank 0 finds it, which would write
        super().setup(trainer, pl_module, stage)


class CommandLine(LightningCLI):
    """Lightning's command line, which knows our strategies, and the user's modules beside a config.

    A wrong name is reported at once, in one sentence.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(parser_class=Parser, **options)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            search_beside_configs(arguments)
        super().parse_arguments(parser, args)

    @override
    def before_instantiate_classes(self) -> None:
        strategy = self.config[self.subcommand].trainer.strategy
        if isinstance(strategy, str) and (problem := strategy_problem(strategy)):
            self.parser.error(problem)
        follow_lab(self.config[self.subcommand].trainer)

    def before_fit(self) -> None:
        """Called by Lightning before ``fit``: reports emulated speeds of the lab that nothing uses."""
        speed, callbacks = os.environ.get(SPEED_VARIABLE, "1"), getattr(self.trainer, "callbacks", [])
        slowed = any(isinstance(each, EmulatedDevice) and each.speed is None for each in callbacks)
        if speed == "1" or slowed or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        print(
            f"In the lab: `--speed` slows nothing on this host, whose speed is to be {speed}: the Trainer has no "
            "EmulatedDevice that takes it from the lab. Give "
            "--trainer.callbacks+=lightning_comm.callbacks.EmulatedDevice --trainer.callbacks.step_s=0.1 "
            "--trainer.callbacks.batch_size=16, as a device of speed 1 has them.",
            file=sys.stderr,
        )


def follow_lab(trainer: Namespace) -> None:
    """On an emulated host, let the Trainer's arguments fit the lab, and print that: one run over all of its hosts."""
    if (text := os.environ.get(LAB_VARIABLE)) is None:
        return
    lab = json.loads(text)
    wanted = {"num_nodes": lab["hosts"], "devices": lab["devices_per_host"]}
    if trainer["accelerator"] == "auto":
        wanted["accelerator"] = "cpu"  # hosts share what this machine has
    changed = {name: value for name, value in wanted.items() if trainer[name] != value}
    for name, value in changed.items():
        trainer[name] = value
    if changed and os.environ.get("NODE_RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0":
        changes = ", ".join(f"{name}={value}" for name, value in changed.items())
        print(f"In the lab: trainer {changes}.", file=sys.stderr)


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
    leave_group_at_exit()
    CommandLine(
        # Lightning warns of arguments that differ from those of the process, so where they are the same it reads them.
        args=None if line == sys.argv[1:] else line,
        # The same command gives the same run, and a run may go on in the folder where it began.
        seed_everything_default=0,
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True},
    )
