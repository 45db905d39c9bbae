"""What the programs that start emulated hosts share: what hosts say, how a run failed, and what it ran on."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_comm.lab.cluster import Lab, LabResult

_BITS_PER_S = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
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


def as_report(title: str) -> dict[str, Any]:
    """Return a report without results."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"title": title, "date": today, "environment": environment(), "configurations": []}


def results_file(stem: str, report: dict[str, Any]) -> Path:
    """Return where results go by default."""
    return Path(__file__).resolve().parents[1] / "docs" / "results" / f"{stem}_{report['date']}.md"


def write(report: dict[str, Any], out: Path, page: str) -> None:
    """Write a page, and the report as JSON beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.write_text(page)


def measure(
    command: list[str],
    where: tuple[int, str, str],
    report: dict[str, Any],
    on_news: Callable[[], None],
    *,
    timeout_s: float,
) -> None:
    """Run a program on emulated hosts and add what it finds to the report.

    Args:
        command: The program.
        where: How many hosts, the rate of their links, and how the report is to call that.
        report: Gets one more configuration.
        on_news: Called whenever there is more in it.
        timeout_s: The longest it may take.

    """
    hosts, link, title = where
    found: dict[str, Any] = {"title": title, "hosts": hosts, "link": link, "labels": {}, "repeats": [], "note": ""}
    found |= {"left_out": [], "error": ""}
    report["configurations"].append(found)

    def on_result(result: dict[str, Any]) -> None:
        if "repeat" in result:
            found["repeats"].append(result)
        else:
            found.update(result)
        on_news()

    with Lab(hosts, link) as lab:
        found["error"] = error_of(lab.run(command, timeout_s=timeout_s, on_line=Listener(on_result)))
    if found["error"]:
        print(f"  ended early: {found['error']}", flush=True)
    on_news()


def close_host() -> None:
    """End the process of a host: threads of other tools may outlive the interpreter and abort a run that went well."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def rate_of(link: str) -> float:
    """Return the bytes per second of a link such as ``"100mbit"``."""
    number = link.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(number) * _BITS_PER_S[link[len(number) :]] / 8
