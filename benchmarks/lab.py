"""How near the emulated links of ``lightning-comm lab`` come to what they state.

    python benchmarks/lab.py [--hosts 2,4] [--links 100mbit,1gbit] [--mib 16] [--repeats 9] [--json FILE]

On every pair of number of hosts and rate, the hosts sum a tensor by gloo's ring all-reduce again and again. What each
host must send for that, 2 (N - 1) / N times the tensor, over the time from a common start until the last host has the
sum, is the goodput. It is put against what the shaping allows: of every 1,514 bytes of an Ethernet frame 1,448 are
payload of TCP. The interfaces' own counters say what was really sent.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lightning_comm.core.quantities import percent
from lightning_comm.core.rates import parse_rate
from lightning_comm.lab.cluster import Lab, unavailable
from lightning_comm.reports.pieces import text_table

PAYLOAD_SHARE = 1448 / 1514  # of a full frame: 14 bytes are Ethernet's, 20 IP's, 32 TCP's with its time stamps
_WARM_UP = 2  # sums that open connections and let TCP find its window


def measure(hosts: int, link: str, mib: float, repeats: int) -> dict[str, Any]:
    """Return the seconds of each sum, and the bytes that the interfaces counted over all of them."""
    with Lab(hosts, link) as lab:
        command = [sys.executable, __file__, "--as-host", "--mib", str(mib), "--repeats", str(repeats)]
        done = lab.run(command, timeout_s=1800)
        sent_bytes = [lab.sent_bytes(host) for host in range(hosts)]
    if done.returncode != 0:
        raise RuntimeError(f"{done.why}:\n{''.join(done.output)}")
    payload_bytes = 2 * (hosts - 1) / hosts * mib * 2**20
    return {
        "hosts": hosts,
        "link": link,
        "allowed_bytes_per_s": parse_rate(link) * PAYLOAD_SHARE,
        "payload_bytes": payload_bytes,
        "seconds": json.loads(done.output[0].strip().splitlines()[-1]),
        "sent_share": statistics.mean(sent_bytes) / (payload_bytes * (repeats + _WARM_UP)),
    }


def as_host(mib: float, repeats: int) -> list[float]:
    """Sum on this host; return the seconds of each sum, by the slowest host, after the ones that warm up."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    tensor = torch.zeros(round(mib * 2**18))
    own = []
    for _ in range(repeats + _WARM_UP):
        time.sleep(0.05)  # queues run empty
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        own.append(time.perf_counter() - began)
    slowest = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()
    return slowest[_WARM_UP:].tolist()


def row(result: dict[str, Any]) -> list[str]:
    """Format one line: median and quartiles of the goodput, as rates and as a share of what the shaping allows."""
    goodputs = [result["payload_bytes"] / seconds for seconds in result["seconds"]]
    shares = [goodput / result["allowed_bytes_per_s"] for goodput in goodputs]
    low, _, high = statistics.quantiles(shares, n=4)
    return [
        f"{result['hosts']} hosts, {result['link']}",
        f"{8e-6 * statistics.median(goodputs):.1f} Mbit/s",
        percent(statistics.median(shares)),
        f"{percent(low)} to {percent(high)}",
        f"{percent(min(shares))} to {percent(max(shares))}",
        f"{result['sent_share']:.3f}",
    ]


def conditions() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "tc": subprocess.run(["tc", "-V"], capture_output=True, text=True).stdout.strip(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure every pair of hosts and link, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="2,4")
    parser.add_argument("--links", default="100mbit,1gbit")
    parser.add_argument("--mib", type=float, default=16, help="size of the tensor (default: %(default)g)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--as-host", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_host:
        print(json.dumps(as_host(options.mib, options.repeats)))
        return
    if (missing := unavailable()) is not None:
        sys.exit(f"{missing}.")
    found = conditions()
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print(f"All-reduce of {options.mib:g} MiB, {options.repeats} repeats; share of what the shaping allows\n")
    results = [
        measure(int(hosts), link, options.mib, options.repeats)
        for hosts in options.hosts.split(",")
        for link in options.links.split(",")
    ]
    header = ["", "median", "share", "quartiles", "range", "sent / payload"]
    print(text_table(header, [row(result) for result in results]))
    if options.json is not None:
        options.json.write_text(json.dumps({"conditions": found, "results": results}, indent=1))


if __name__ == "__main__":
    main()
