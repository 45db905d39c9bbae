"""Emulated hosts as whoever starts them sees them: programs on them, what they say, and how they failed."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.kit.results import Results
from lightning_comm.core.quantities import duration
from lightning_comm.lab.cluster import Lab, LabResult, unavailable

PAYLOAD_SHARE = 1448 / 1514  # of a full frame: 14 bytes are Ethernet's, 20 IP's, 32 TCP's with its time stamps
TIMEOUT_S = 1800.0


def program(module: str, *words: str) -> list[str]:
    """Return the command that runs a module of the benchmarks, as this process was started: from the root."""
    return [sys.executable, "-m", f"benchmarks.{module}", *words]


def as_host(module: str, options: Any) -> list[str]:
    """Return the command of a host, for a module that ends with `entry`."""
    return program(module, "--as-host", json.dumps(options))


def entry(main: Callable[[], Any], on_host: Callable[[Any], Any]) -> None:
    """Run what this process is there for: a host's part, whose answer is printed as a line, or the whole."""
    if "--as-host" not in sys.argv:
        main()
    elif (answer := on_host(json.loads(sys.argv[-1]))) is not None:
        print(json.dumps(answer), flush=True)


def need_hosts() -> None:
    """End with the reason where there are no emulated hosts."""
    if (missing := unavailable()) is not None:
        sys.exit(f"This needs emulated hosts: {missing}")


def ask(lab: Lab, module: str, options: Any) -> Any:
    """Return what the part of a module on host 0 answered.

    Raises:
        RuntimeError: If a host failed.

    """
    done = lab.run(as_host(module, options), timeout_s=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{done.why}:\n{''.join(done.output)}")
    return json.loads(done.output[0].strip().splitlines()[-1])


def ring_bytes(hosts: int, payload_bytes: float) -> float:
    """Return what a host sends in a ring all-reduce.

    >>> ring_bytes(4, 100.0)
    150.0
    """
    return 2 * (hosts - 1) / hosts * payload_bytes


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


class Comparison(NamedTuple):
    """What hosts of one kind measure on one link.

    Args:
        title: As the report calls it.
        hosts: How many there are.
        link: The rate of their links.
        options: What each host is told.
        expected_s: About how long it takes.

    """

    title: str
    hosts: int
    link: str
    options: dict[str, Any]
    expected_s: float = 0.0

    def begin(self, **fields: Any) -> dict[str, Any]:
        """Return what is known of it before it runs."""
        found: dict[str, Any] = {"title": self.title, "hosts": self.hosts, "link": self.link, "labels": {}}
        return found | {"repeats": [], "note": "", "left_out": [], "error": "", **fields}


def measure(
    module: str, comparison: Comparison, found: dict[str, Any], on_news: Callable[[], Any], timeout_s: float
) -> str:
    """Run a module on emulated hosts and add what it finds; return which method was at work in the end.

    Args:
        module: Ends with `entry`.
        comparison: What is measured where.
        found: Gets repeats and whatever else hosts say.
        on_news: Called whenever there is more in it.
        timeout_s: The longest it may take.

    """

    def on_result(result: dict[str, Any]) -> None:
        if "repeat" in result:
            found["repeats"].append(result)
        else:
            found.update(result)
        on_news()

    listener = Listener(on_result)
    with Lab(comparison.hosts, comparison.link) as lab:
        command = as_host(module, comparison.options)
        found["error"] = error_of(lab.run(command, timeout_s=timeout_s, on_line=listener))
    if found["error"]:
        print(f"  ended early: {found['error']}", flush=True)
    on_news()
    return listener.at


def measure_all(
    module: str,
    comparisons: Iterable[Comparison],
    results: Results,
    on_news: Callable[[], Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Measure one comparison after the other, and say before how long each, and all, may take.

    Args:
        module: Ends with `entry`.
        comparisons: What is measured.
        results: Get a configuration for each.
        on_news: Called whenever there is more in them; writes them if left out.
        timeout_s: The longest that one may take.

    """
    comparisons = list(comparisons)
    print(f"{len(comparisons)} configurations, about {duration(sum(each.expected_s for each in comparisons))} in all")
    for each in comparisons:
        print(f"{each.title}: about {duration(each.expected_s)}", flush=True)
        results.report["configurations"].append(found := each.begin())
        measure(module, each, found, on_news or results.write, timeout_s)
    results.tell()
