"""How near the emulated links of ``lightning-comm lab`` come to what they state.

    python -m benchmarks.instruments.lab [--hosts 2,4] [--links 100mbit,1gbit] [--mib 16] [--repeats 9] [--json FILE]

On every pair of number of hosts and rate, the hosts sum a tensor by gloo's ring all-reduce again and again. What each
host must send for that, 2 (N - 1) / N times the tensor, over the time from a common start until the last host has the
sum, is the goodput. It is put against what the shaping allows: of every 1,514 bytes of an Ethernet frame 1,448 are
payload of TCP. The interfaces' own counters say what was really sent.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.kit.environment import environment
from benchmarks.kit.hosts import PAYLOAD_SHARE, ask, entry, need_hosts, ring_bytes
from benchmarks.kit.options import Parser
from benchmarks.kit.statistics import quartiles
from benchmarks.kit.tables import Column, ends, terminal
from lightning_comm.core.rates import parse_rate
from lightning_comm.lab.cluster import Lab

_WARM_UP = 2  # sums that open connections and let TCP find its window


def measure(hosts: int, link: str, mib: float, repeats: int) -> dict[str, Any]:
    """Return the seconds of each sum, and the bytes that the interfaces counted over all of them."""
    with Lab(hosts, link) as lab:
        seconds = ask(lab, "instruments.lab", {"mib": mib, "repeats": repeats})
        sent_bytes = [lab.sent_bytes(host) for host in range(hosts)]
    payload_bytes = ring_bytes(hosts, mib * 2**20)
    return {
        "hosts": hosts,
        "link": link,
        "allowed_bytes_per_s": parse_rate(link) * PAYLOAD_SHARE,
        "payload_bytes": payload_bytes,
        "seconds": seconds,
        "sent_share": statistics.mean(sent_bytes) / (payload_bytes * (repeats + _WARM_UP)),
    }


def on_host(options: dict[str, Any]) -> list[float]:
    """Sum on this host; return the seconds of each sum, by the slowest host, after the ones that warm up."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    tensor = torch.zeros(round(options["mib"] * 2**18))
    own = []
    for _ in range(options["repeats"] + _WARM_UP):
        time.sleep(0.05)  # queues run empty
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        own.append(time.perf_counter() - began)
    slowest = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()
    return slowest[_WARM_UP:].tolist()


def goodputs(result: dict[str, Any]) -> list[float]:
    """Return the bytes per second of each sum."""
    return [result["payload_bytes"] / seconds for seconds in result["seconds"]]


def shares(result: dict[str, Any]) -> list[float]:
    """Return the same as shares of what the shaping allows, in per cent."""
    return [100 * each / result["allowed_bytes_per_s"] for each in goodputs(result)]


COLUMNS = [
    Column("", lambda result: f"{result['hosts']} hosts, {result['link']}"),
    Column("median", lambda result: f"{8e-6 * statistics.median(goodputs(result)):.1f} Mbit/s"),
    Column("share, %", lambda result: f"{statistics.median(shares(result)):.1f}"),
    Column("quartiles", lambda result: ends(quartiles(shares(result)))),
    Column("range", lambda result: ends(shares(result))),
    Column("sent / payload", lambda result: f"{result['sent_share']:.3f}"),
]


def conditions() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "environment": environment(),
        "tc": subprocess.run(["tc", "-V"], capture_output=True, text=True).stdout.strip(),
        "load": round(os.getloadavg()[0], 1),
    }


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--hosts", default="2,4")
    parser.add_argument("--links", default="100mbit,1gbit")
    parser.number("--mib", 16.0, "size of the tensor")
    parser.number("--repeats", 9)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every pair of hosts and link, and print a table."""
    given = options()
    need_hosts()
    found = conditions()
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(f"All-reduce of {given.mib:g} MiB, {given.repeats} repeats; share of what the shaping allows\n")
    results = [
        measure(int(hosts), link, given.mib, given.repeats)
        for hosts in given.hosts.split(",")
        for link in given.links.split(",")
    ]
    print(terminal(COLUMNS, results))
    if given.json is not None:
        given.json.write_text(json.dumps({"conditions": found, "results": results}, indent=1))


if __name__ == "__main__":
    entry(main, on_host)
