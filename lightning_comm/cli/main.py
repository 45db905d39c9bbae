"""The console command ``lightning-comm``: finds the subcommand and hands the rest of the line to it."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

# What a subcommand does, and the function that does it: imported when it is called, and given the words after its name.
COMMANDS = {
    "fit": ("train a model", "lightning_comm.cli.training:fit"),
    "validate": ("measure a trained model on the validation data", "lightning_comm.cli.training:validate"),
    "test": ("measure a trained model on the test data", "lightning_comm.cli.training:test"),
    "predict": ("let a trained model answer", "lightning_comm.cli.training:predict"),
    "lab": ("run a command on emulated hosts, joined by links of a stated speed", "lightning_comm.cli.lab:main"),
    "probe": ("measure the link between the ranks of a job", "lightning_comm.cli.probe:main"),
    "pilot": ("try strategies on your own config for a few steps, and compare them", "lightning_comm.cli.pilot:main"),
    "demo": ("train real digits with DDP, local SGD and QSR, and compare them", "lightning_comm.cli.demo:main"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: The words after ``lightning-comm``; ``None`` takes those that the process was started with.

    """
    name, *rest = (sys.argv[1:] if args is None else list(args)) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from lightning_comm import __version__

        print(f"lightning-comm {__version__}")
        return 0
    if name not in COMMANDS:
        print(_unknown(name) if name else _help(), file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][1].partition(":")
    run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
    return run(rest) or 0


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items())
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
