"""What the programs that start emulated hosts share: what hosts say, how a run failed, and what it ran on."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_comm.lab.cluster import LabResult

_PACKAGES = ("torch", "lightning", "timm", "lightning-comm", "accelerate", "torchft")


class Listener:
    """Hears what host 0 says: shows its progress, hands on its results, and knows which method is at work.

    Args:
        on_result: Called with every result.

    """

    def __init__(self, on_result: Callable[[dict[str, Any]], None]) -> None:
        self._on_result = on_result
        self._started = time.monotonic()
        self.at = ""

    def __call__(self, host: int, line: str, is_error: bool) -> None:
        kind, _, text = line.strip().partition(" ")
        if host == 0 and kind == "AT":
            self.at = text
        elif host == 0 and kind == "PROGRESS":
            print(f"  {time.monotonic() - self._started:5.0f} s  {text}", flush=True)
        elif host == 0 and kind == "RESULT":
            self._on_result(json.loads(text))


def error_of(done: LabResult) -> str:
    """Return how a run failed, with the end of what that host said; empty where it did not."""
    if done.returncode == 0:
        return ""
    said = done.output[done.host or 0].strip().splitlines()
    told = [line for line in said if "[W" not in line and not line.startswith(("AT ", "PROGRESS ", "RESULT "))]
    return "\n".join([*told[-4:], done.why])


def environment() -> str:
    """Say which versions and which processor a report is of."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return (
        f"{', '.join(versions)}; Python {platform.python_version()}, Linux {platform.release()}, {_processor()}, "
        f"{os.cpu_count()} cores shared by all hosts; gloo, 1 thread a process."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
