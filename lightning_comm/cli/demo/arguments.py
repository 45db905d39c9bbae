"""The arguments of ``lightning-comm demo``, and the packages that it needs."""

import argparse
import sys
from collections.abc import Sequence

from lightning_comm.core.extras import missing_extras

_IMAGES = 1437  # to train on, in DigitsData


def check(argv: Sequence[str]) -> int:
    """Return 0, or 1 after saying what is not installed: now, and not after minutes of training."""
    parse(argv)
    if (missing := missing_extras("lightning-comm demo", "timm", "sklearn", "matplotlib")) is not None:
        print(missing, file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="lightning-comm demo",
        description="Train a small ViT on real handwritten digits with DDP, local SGD and QSR, and compare them.",
    )
    add = parser.add_argument
    add("--devices", type=int, default=4, help="processes, at least 2 (default: %(default)s)")
    add("--epochs", type=int, default=60, help="passes through the training images (default: %(default)s)")
    add("--seeds", type=int, default=1, help="paired seeds: each method trains once with each (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate, equal for all methods (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="images per batch and process (default: %(default)s)")
    add("--pilot-repeats", type=int, default=3, help="of each method on slow links; 0: none (default: %(default)s)")
    add("--out", default="demo_results", help="a new folder is made in here (default: %(default)s/)")
    arguments = parser.parse_args(argv)
    for name, least, meaning in (
        ("devices", 2, "One process has nobody to talk to."),
        ("epochs", 1, "60 take about a minute a run on 2 cores."),
        ("seeds", 1, "5 show how much results spread."),
        ("batch_size", 1, "The global batch is as many times larger as there are processes."),
        ("pilot_repeats", 0, "0 leaves the times on slow links out."),
    ):
        value = getattr(arguments, name)
        if value < least:
            parser.error(f"`--{name.replace('_', '-')}` must be >= {least}; got {value}. {meaning}")
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"`--lr` is the peak learning rate, so it must be finite and > 0; got {arguments.lr}.")
    if arguments.devices * arguments.batch_size > _IMAGES:
        parser.error(
            f"`--batch-size` {arguments.batch_size} on {arguments.devices} processes is more than the {_IMAGES} "
            f"training images; it must be <= {_IMAGES // arguments.devices}."
        )
    return arguments
