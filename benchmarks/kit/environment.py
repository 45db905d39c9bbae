"""Versions and hardware that a page's figures depend on."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "lightning", "timm", "lightning-comm", "accelerate", "torchft")
SHARED = "cores shared by all hosts; gloo, 1 thread a process"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(cores: str = SHARED) -> str:
    """Say in a line which versions and which processor a report is of.

    Args:
        cores: What is to be said of the cores, behind their number.

    """
    found = versions(_PACKAGES)
    told = [f"{name} {found[name]}" if name in found else f"{name} not installed" for name in _PACKAGES]
    return (
        f"{', '.join(told)}; Python {platform.python_version()}, Linux {platform.release()}, {_processor()}, "
        f"{os.cpu_count()} {cores}."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
