"""The environment of a measured figure: versions and hardware, on which it depends besides the settings."""

import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path


def environment() -> dict[str, str]:
    """Return the date, the versions and the hardware, by name."""
    versions = {name: version_of(name) for name in ("lightning-comm", "torch", "lightning", "timm")}
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "load average at the start": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "not known",
    }


def version_of(name: str) -> str:
    """Return the version of an installed package; a source folder on ``PYTHONPATH`` is none.

    Example:
        >>> version_of("no-such-package")
        'not installed'

    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
