"""The console command ``lightning-comm``: it finds the subcommand and passes it the other arguments."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_comm.cli.environment import version_of


class Command(NamedTuple):
    """A subcommand.

    Args:
        what: A description.
        run: The function that does it, as ``module:name``: imported when it is called, and given the arguments after
            the subcommand's name.
        check: A function that is given them before torch is loaded. It ends the process, or returns its exit code,
            where they ask for help or make no sense.
        needs_all: Whether ``run`` needs all of the package, which is torch and Lightning as well.

    """

    what: str
    run: str
    check: str | None = None
    needs_all: bool = True


_CLI = "lightning_comm.cli."


def _fit(name: str) -> tuple[str, str]:
    return f"{_CLI}fit.command:{name}", f"{_CLI}fit.arguments:check_{name}"


COMMANDS = {
    "fit": Command("train a model", *_fit("fit")),
    "validate": Command(
        "measure a trained model on the validation data",
        _CLI + "fit.command:validate",
        _CLI + "fit.arguments:check_validate",
    ),
    "test": Command("measure a trained model on the test data", *_fit("test")),
    "predict": Command("let a trained model answer", *_fit("predict")),
    "lab": Command(
        "run a command on emulated hosts, joined by links of a stated speed", _CLI + "lab:main", needs_all=False
    ),
    "probe": Command(
        "measure the link between the ranks of a job", _CLI + "probe.command:main", _CLI + "probe.arguments:check"
    ),
    "pilot": Command(
        "try strategies on your own config for a few steps, and compare them",
        _CLI + "pilot.command:main",
        _CLI + "pilot.arguments:check",
    ),
    "demo": Command(
        "train real digits with DDP, local SGD and QSR, and compare them",
        _CLI + "demo.command:main",
        _CLI + "demo.arguments:check",
    ),
}


def main(args: Sequence[str] | None = None, load_all: Callable[[], object] = lambda: None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: The arguments after ``lightning-comm``; ``None`` takes those that the process was started with.
        load_all: Loads what of the package is not loaded yet; called before a command that needs it.

    """
    name, *rest = (sys.argv[1:] if args is None else list(args)) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"lightning-comm {version_of('lightning-comm')}")
        return 0
    if name not in COMMANDS:
        print(_unknown(name) if name else _help(), file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if command.check is not None and (code := _function(command.check)(rest)):
        return code
    if command.needs_all:
        load_all()
    return _function(command.run)(rest) or 0


def _function(place: str) -> Callable[[list[str]], int | None]:
    module, _, name = place.partition(":")
    function: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), name)
    return function


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = "\n".join(f"  {name:<{width}}  {command.what}" for name, command in COMMANDS.items())
    return (
        "usage: lightning-comm COMMAND [options]\n\n"
        "Training with PyTorch Lightning that communicates less.\n\n"
        f"{lines}\n\n"
        "lightning-comm COMMAND --help   the options of a command\n"
        "lightning-comm --version        the version of this package"
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        f"lightning-comm: the command must be one of {', '.join(COMMANDS)}; got {name!r}. {meant}`lightning-comm "
        "--help` says what each of them does."
    )


if __name__ == "__main__":
    sys.exit(main())
