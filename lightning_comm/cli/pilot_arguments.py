"""The words after ``lightning-comm pilot``: its own options, and those of ``fit``, which describe the user's run."""

import argparse
import difflib
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_comm.cli.pilot_run import OWN, without_start_method
from lightning_comm.cli.training import CommandLine
from lightning_comm.core.rates import format_rate, parse_rate
from lightning_comm.lab.cluster import LAB_VARIABLE, check_arguments, unavailable
from lightning_comm.planning.pilot import BASELINE

_DESCRIPTION = (
    "Run your own config for a few steps under several strategies, interleaved, and compare step time, bytes and "
    "exposed communication with plain DDP and with the same job without communication; project the whole run over your "
    "own learning-rate schedule. Every other option is one of `lightning-comm fit`, such as --trainer.devices 4 or "
    "--model.init_args.lr 0.01. Loggers, checkpoints, early stopping, progress bars, tuners and validation are off."
)


class Refused(Exception):
    """The words make no sense; the message says which, why, and what would."""


@dataclass(frozen=True)
class Options:
    """The pilot's own options.

    Args:
        strategies: Names, DDP first, without the way of starting processes.
        steps: Optimizer steps of a trial.
        warmup_steps: How many of them are not counted.
        repeats: Trials of each strategy.
        hosts: Emulated hosts; ``None`` for none.
        link: Rates of their links.
        devices_per_host: Ranks on each of them.
        device_s: Seconds that a batch takes on an emulated device; ``None`` for the real one.
        cost_per_hour: Of the whole cluster, in any currency.
        timeout_s: How long all ranks may say nothing.
        out: A folder, in which a new one is made.

    """

    strategies: tuple[str, ...]
    steps: int
    warmup_steps: int
    repeats: int
    hosts: int | None
    link: str | tuple[str, ...]
    devices_per_host: int
    device_s: float | None
    cost_per_hour: float | None
    timeout_s: float
    out: str

    def shown(self) -> dict[str, Any]:
        """Return what the report says of them."""
        return {
            "strategies": list(self.strategies),
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "repeats": self.repeats,
            "hosts": self.hosts,
            "devices_per_host": self.devices_per_host if self.hosts else None,
            "device_s": self.device_s,
            "cost_per_hour": self.cost_per_hour,
        }


@dataclass(frozen=True)
class UserRun:
    """Where the user's run takes place.

    Args:
        ranks: How many there are.
        rank: This process's, if they exist already.
        started_externally: Whether they do: under torchrun, SLURM or the lab.
        trainer: Arguments of the Trainer that differ from the user's, on emulated hosts.
        lab: The emulated hosts, as the variable that the lab sets says it; ``None`` on real ones.

    """

    ranks: int
    rank: int
    started_externally: bool
    trainer: dict[str, Any]
    lab: dict[str, Any] | None


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the pilot's own options, and the other words.

    Raises:
        Refused: If an option is out of range, or the strategies have no such name.

    """
    parser = argparse.ArgumentParser(prog="lightning-comm pilot", description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--config", "-c", action="append", metavar="FILE", help="your config, as for `fit`; may be given several times")
    add(
        "--strategies",
        default="ddp,local_sgd,qsr",
        metavar="NAMES",
        help=f"what to try, with commas; `{OWN}` is the one that the config has; `{BASELINE}`, with which all are "
        "compared, is always among them (default: %(default)s)",
    )
    add("--steps", type=int, default=60, help="optimizer steps of each trial (default: %(default)s)")
    add("--warmup-steps", type=int, default=10, help="how many of them are not counted (default: %(default)s)")
    add("--repeats", type=int, default=5, help="trials of each strategy (default: %(default)s)")
    add("--hosts", type=int, help="run on so many emulated hosts on this machine, as `lightning-comm lab` does")
    add("--link", default="1gbit", metavar="RATE", help="the rate of their links, or one a host, with commas")
    add("--devices-per-host", type=int, default=1, help="ranks on each emulated host (default: %(default)s)")
    add("--device-ms", type=float, metavar="MS", help="emulate a device on which a batch takes so many milliseconds")
    add("--cost-per-hour", type=float, metavar="PRICE", help="of the whole cluster; the report then names savings")
    add("--timeout", type=float, default=600.0, metavar="S", help="how long ranks may be silent (default: %(default)s)")
    add("--out", default="pilot_results", help="a new folder is made in here (default: %(default)s/)")
    known, words = parser.parse_known_args(argv)
    _check(known)
    links = tuple(known.link.split(","))
    options = Options(
        strategies=_strategies(known.strategies),
        steps=known.steps,
        warmup_steps=known.warmup_steps,
        repeats=known.repeats,
        hosts=known.hosts,
        link=links[0] if len(links) == 1 else links,
        devices_per_host=known.devices_per_host,
        device_s=None if known.device_ms is None else known.device_ms / 1000,
        cost_per_hour=known.cost_per_hour,
        timeout_s=known.timeout,
        out=known.out,
    )
    _check_hosts(options)
    return options, [*(f"--config={file}" for file in known.config), *words]


def _check(known: argparse.Namespace) -> None:
    if not known.config:
        raise Refused("`--config` must name your config, the one that `lightning-comm fit` takes; got none.")
    for name, least, meaning in (
        ("steps", 2, "60 show several rounds of most strategies."),
        ("warmup_steps", 0, "10 let caches and buckets settle."),
        ("repeats", 1, "5 show how much the figures spread."),
        ("devices_per_host", 1, "Each is a rank."),
    ):
        if getattr(known, name) < least:
            option = "--" + name.replace("_", "-")
            raise Refused(f"`{option}` must be >= {least}; got {getattr(known, name)}. {meaning}")
    if known.warmup_steps >= known.steps:
        raise Refused(
            f"`--steps` must be more than the {known.warmup_steps} that are not counted; got {known.steps}. Give more, "
            "or fewer --warmup-steps."
        )
    for name, unit in (("device_ms", "milliseconds of a batch"), ("cost_per_hour", "a price"), ("timeout", "seconds")):
        value = getattr(known, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            option = "--" + name.replace("_", "-")
            raise Refused(f"`{option}` is {unit}, so it must be finite and > 0; got {value}. Leave it out for none.")


def _check_hosts(options: Options) -> None:
    if options.hosts is None:
        return
    if (missing := unavailable()) is not None:
        raise Refused(
            f"`--hosts` needs emulated hosts, and here are none: {missing}. Leave it out to use this machine."
        )
    try:
        check_arguments(options.hosts, options.link, None, options.devices_per_host)
    except ValueError as error:
        raise Refused(f"`--hosts` and `--link` describe no lab. {error}") from error


def _strategies(text: str) -> tuple[str, ...]:
    known = [OWN, *StrategyRegistry.available_strategies()]
    names = [without_start_method(name.strip().lower()) for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise Refused(
                f"`--strategies` must be names that Lightning knows, or `{OWN}`; got {name!r}. "
                + (f"Near it are {', '.join(near)}." if near else f"Known are {', '.join(known)}.")
            )
    if not names:
        raise Refused(f"`--strategies` must name at least one; got {text!r}. The default is ddp,local_sgd,qsr.")
    return tuple(dict.fromkeys([BASELINE, *names]))


def read_run(options: Options, words: Sequence[str]) -> UserRun:
    """Read the user's config and return where the run takes place. Nothing of the config is built.

    Raises:
        Refused: If the place makes no sense, or the config lacks what the options speak of.
        SystemExit: From Lightning's parser, which says what is wrong with the config.

    """
    with _quietly():
        config = _config(words).trainer
    if OWN in options.strategies and config.strategy in (None, "auto"):
        raise Refused(
            f"`--strategies` names `{OWN}`, the strategy of your config, and the config has none (trainer.strategy is "
            f"{config.strategy!r}). Leave `{OWN}` out, or give the config a strategy."
        )
    place: dict[str, Any] = {}
    if options.hosts is not None:
        place = {"num_nodes": options.hosts, "devices": options.devices_per_host}
        if config.accelerator == "auto":
            place["accelerator"] = "cpu"
    with _quietly():
        trainer = _trainer(config, place)
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
        trainer=place,
        lab=_lab(options),
    )


def _lab(options: Options) -> dict[str, Any] | None:
    if options.hosts is None:
        told = os.environ.get(LAB_VARIABLE)
        lab = None if told is None else dict(json.loads(told))
    else:
        links = [options.link] * options.hosts if isinstance(options.link, str) else [*options.link]
        lab = {"hosts": options.hosts, "devices_per_host": options.devices_per_host, "links": links}
    return lab and {**lab, "links": [format_rate(parse_rate(link)) for link in lab["links"]]}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Lightning's remarks about seeds and devices for the ranks, which make them as well."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _ConfigRead(Exception):
    """Ends Lightning's command line once the config is read."""


class _ConfigOnly(CommandLine):
    @override
    def instantiate_classes(self) -> NoReturn:
        raise _ConfigRead(self.config.fit)


def _config(words: Sequence[str]) -> Namespace:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the words are not its own
            _ConfigOnly(args=["fit", *words], seed_everything_default=0, save_config_callback=None)
    except _ConfigRead as read:
        config: Namespace = read.args[0]
        return config
    raise AssertionError("Lightning built nothing")


def _trainer(config: Namespace, place: dict[str, Any]) -> Trainer:
    """Return a Trainer that knows how many ranks there are, and has nothing else of the user's."""
    asked = {name: config[name] for name in ("accelerator", "devices", "num_nodes")}
    if not isinstance(asked["accelerator"], str):
        asked["accelerator"] = "auto"  # a class of the user's, which only a rank builds
    try:
        return Trainer(
            **{**asked, **place},
            strategy=BASELINE,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise Refused(f"the Trainer of your config cannot be built: {error}") from error
