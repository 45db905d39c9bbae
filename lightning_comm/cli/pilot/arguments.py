"""The arguments of ``lightning-comm pilot``: its own options, and those of ``fit``, which describe the user's run."""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_comm.cli.fit.arguments import problem_of, stray_problem, strays
from lightning_comm.lab.cluster import check_arguments, unavailable
from lightning_comm.planning.pilot.costs import BASELINE
from lightning_comm.planning.pilot.length import STEPS, WARMUP_STEPS

OWN = "config"  # the strategy that the user's config has

_DESCRIPTION = (
    "Run your own config for a few steps under several strategies, interleaved, and compare step time, bytes and "
    "exposed communication with plain DDP and with the same job without communication; project the whole run over your "
    "own learning-rate schedule. Every other option is one of `lightning-comm fit`, such as --trainer.devices 4 or "
    "--model.init_args.lr 0.01. Loggers, checkpoints, early stopping, progress bars, tuners and validation are off."
)


class Refused(Exception):
    """The arguments are wrong; the message names which, why, and the way out."""


@dataclass(frozen=True)
class Options:
    """The pilot's own options.

    Args:
        strategies: Names, DDP first, without the way of starting processes.
        steps: Optimizer steps of a trial.
        warmup_steps: How many of them are not counted.
        set_by_user: Which of these two the user gave; the other is fitted to a run that is shorter.
        repeats: Trials of each strategy.
        hosts: Emulated hosts; ``None`` for none.
        link: Rates of their links.
        devices_per_host: Ranks on each of them.
        device_s: Seconds that a batch takes on an emulated device; ``None`` for the real one.
        cost_per_hour: Of the whole cluster, in any currency.
        timeout_s: How long all ranks may report nothing.
        out: A folder, in which a new one is made.

    """

    strategies: tuple[str, ...]
    steps: int
    warmup_steps: int
    set_by_user: tuple[str, ...]
    repeats: int
    hosts: int | None
    link: str | tuple[str, ...]
    devices_per_host: int
    device_s: float | None
    cost_per_hour: float | None
    timeout_s: float
    out: str

    def shown(self) -> dict[str, Any]:
        """Return the options as the report shows them."""
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


def check(argv: Sequence[str]) -> int:
    """Return 0, or 2 after saying what is wrong with the options, as far as that can be seen without torch."""
    try:
        _own_options(argv)
    except Refused as refused:
        print(f"lightning-comm pilot: error: {refused}", file=sys.stderr)
        return 2
    return 0


def _own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
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
    fewer = "fewer where your run has fewer"
    add("--steps", type=int, help=f"optimizer steps of each trial (default: {STEPS}, {fewer})")
    add("--warmup-steps", type=int, help=f"how many of them are not counted (default: {WARMUP_STEPS}, {fewer})")
    add("--repeats", type=int, default=5, help="trials of each strategy (default: %(default)s)")
    add("--hosts", type=int, help="run on so many emulated hosts on this machine, as `lightning-comm lab` does")
    add("--link", default="1gbit", metavar="RATE", help="the rate of their links, or one a host, with commas")
    add("--devices-per-host", type=int, default=1, help="ranks on each emulated host (default: %(default)s)")
    add("--device-ms", type=float, metavar="MS", help="emulate a device on which a batch takes so many milliseconds")
    add("--cost-per-hour", type=float, metavar="PRICE", help="of the whole cluster; the report then names savings")
    add("--timeout", type=float, default=600.0, metavar="S", help="how long ranks may be silent (default: %(default)s)")
    add("--out", default="pilot_results", help="a new folder is made in here (default: %(default)s/)")
    known, arguments = parser.parse_known_args(argv)
    known.set_by_user = tuple(name for name in ("steps", "warmup_steps") if getattr(known, name) is not None)
    known.steps = STEPS if known.steps is None else known.steps
    known.warmup_steps = WARMUP_STEPS if known.warmup_steps is None else known.warmup_steps
    if (found := strays(arguments)) != []:
        raise Refused(stray_problem(found[0]))
    _check(known)
    return known, arguments


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the pilot's own options, and the other arguments.

    Raises:
        Refused: If an option is out of range, or the strategies have no such name.

    """
    known, arguments = _own_options(argv)
    links = tuple(known.link.split(","))
    options = Options(
        strategies=_strategies(known.strategies),
        steps=known.steps,
        warmup_steps=known.warmup_steps,
        set_by_user=known.set_by_user,
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
    return options, [*(f"--config={file}" for file in known.config), *arguments]


def _check(known: argparse.Namespace) -> None:
    if not known.config:
        raise Refused("`--config` must name your config, the one that `lightning-comm fit` takes; got none.")
    if (problem := problem_of([f"--config={file}" for file in known.config])) is not None:
        raise Refused(problem)
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


def without_start_method(name: str) -> str:
    """Return the strategy for processes that are started already, as those of a pilot are."""
    for suffix in ("_spawn", "_forkserver", "_fork", "_notebook"):
        name = name.removesuffix(suffix)
    return name


def _strategies(text: str) -> tuple[str, ...]:
    from lightning.pytorch.strategies import StrategyRegistry  # torch, which the options do without

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
