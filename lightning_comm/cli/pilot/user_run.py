"""The run of a pilot's user: where its ranks are, read from config and options before anything of it is built."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_comm.cli.fit.command import CommandLine
from lightning_comm.cli.pilot.arguments import OWN, Options, Refused
from lightning_comm.cli.quiet import lightning_is_quiet
from lightning_comm.core.rates import format_rate, parse_rate
from lightning_comm.lab.cluster import LAB_VARIABLE
from lightning_comm.planning.pilot.costs import BASELINE


@dataclass(frozen=True)
class UserRun:
    """Where the user's run takes place.

    Args:
        ranks: How many there are.
        rank: This process's, if they exist already.
        started_externally: Whether they do: under torchrun, SLURM or the lab.
        trainer: Arguments of the Trainer that differ from the user's, on emulated hosts.
        lab: The emulated hosts, from the variable that the lab sets; ``None`` on real ones.

    """

    ranks: int
    rank: int
    started_externally: bool
    trainer: dict[str, Any]
    lab: dict[str, Any] | None


def read_run(options: Options, arguments: Sequence[str]) -> UserRun:
    """Read the user's config and return where the run takes place. Nothing of the config is built.

    Raises:
        Refused: If there can be no such ranks, or the config lacks what the options refer to.
        SystemExit: From Lightning's parser, with a message on what is wrong with the config.

    """
    with lightning_is_quiet():
        config = _config(arguments).trainer
    if OWN in options.strategies and config.strategy in (None, "auto"):
        raise Refused(
            f"`--strategies` names `{OWN}`, the strategy of your config, and the config has none (trainer.strategy is "
            f"{config.strategy!r}). Leave `{OWN}` out, or give the config a strategy."
        )
    hosts: dict[str, Any] = {}
    if options.hosts is not None:
        hosts = {"num_nodes": options.hosts, "devices": options.devices_per_host}
        if config.accelerator == "auto":
            hosts["accelerator"] = "cpu"
    with lightning_is_quiet():
        trainer = _trainer(config, hosts)
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]  # DDP has one
    externally = environment.creates_processes_externally
    if externally and options.hosts is not None:
        raise Refused("`--hosts` starts ranks of its own, and this process is one already. Start the pilot by itself.")
    if trainer.world_size == 1:
        raise Refused(
            "one rank has nobody to talk to, so there is nothing to compare; got trainer.devices="
            f"{config.devices!r}. Give --trainer.devices 2 or more, or --hosts 2."
        )
    if trainer.num_nodes > 1 and not externally and options.hosts is None:
        raise Refused(
            f"`trainer.num_nodes` is {trainer.num_nodes}, and the pilot starts ranks on one machine only. Start it on "
            "each host as you start `fit`, with torchrun or SLURM, or emulate them with --hosts."
        )
    return UserRun(
        ranks=trainer.world_size,
        rank=trainer.global_rank if externally else 0,
        started_externally=externally,
        trainer=hosts,
        lab=_lab(options),
    )


def _lab(options: Options) -> dict[str, Any] | None:
    if options.hosts is None:
        described = os.environ.get(LAB_VARIABLE)
        lab = None if described is None else dict(json.loads(described))
    else:
        links = [options.link] * options.hosts if isinstance(options.link, str) else [*options.link]
        lab = {"hosts": options.hosts, "devices_per_host": options.devices_per_host, "links": links}
    return lab and {**lab, "links": [format_rate(parse_rate(link)) for link in lab["links"]]}


class _ConfigRead(Exception):
    """Ends Lightning's command line once the config is read."""


class _ConfigOnly(CommandLine):
    @override
    def instantiate_classes(self) -> NoReturn:
        raise _ConfigRead(self.config.fit)


def _config(arguments: Sequence[str]) -> Namespace:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the arguments are not its own
            _ConfigOnly(args=["fit", *arguments], seed_everything_default=0, save_config_callback=None)
    except _ConfigRead as read:
        config: Namespace = read.args[0]
        return config
    raise AssertionError("Lightning built nothing")


def _trainer(config: Namespace, hosts: dict[str, Any]) -> Trainer:
    """Return a Trainer that knows how many ranks there are, and has nothing else of the user's."""
    asked = {name: config[name] for name in ("accelerator", "devices", "num_nodes")}
    if not isinstance(asked["accelerator"], str):
        asked["accelerator"] = "auto"  # a class of the user's, which only a rank builds
    try:
        return Trainer(
            **{**asked, **hosts},
            strategy=BASELINE,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise Refused(f"the Trainer of your config cannot be built: {error}") from error
