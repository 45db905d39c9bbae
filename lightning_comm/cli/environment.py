"""What figures depend on besides the settings: versions and hardware."""

import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path


def environment() -> dict[str, str]:
    """Return the date, the versions and the hardware, by name."""
    versions = {}
    for name in ("lightning-comm", "torch", "lightning", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "load average at the start": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "not known",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
