"""Lightning's command line as a test that is not about its parser needs it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from lightning.pytorch.cli import LightningCLI


@contextmanager
def only_fit_is_parsed() -> Iterator[None]:
    """Let command lines of this process, and of those forked from it, know no subcommand but ``fit``.

    Lightning builds the parsers of all four before it reads a word, though all four are alike: half of what reading a
    config takes, for each rank. Real starts of the installed command build them all.
    """
    fit = {"fit": LightningCLI.subcommands()["fit"]}
    with mock.patch.object(LightningCLI, "subcommands", staticmethod(lambda: fit)):
        yield


def with_fewer_packages() -> dict[str, str]:
    """Return variables for a real start that needs no example: as where torchvision and scipy are not installed.

    Lightning loads in two thirds of the time there. Real starts of the demo, which needs both, show that all load.
    """
    path = [str(Path(__file__).parent / "fewer_packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
