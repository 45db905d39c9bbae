"""What a synchronisation costs under each compression: on emulated hosts, and in packing alone.

    python benchmarks/synchronisation.py [--hosts 4] [--links 100mbit] [--mib 25] [--repeats 5] [--json FILE]

One bucket of random gradients is synchronised by each method in turn, all in the same processes, in an order that
rotates from repeat to repeat; a time is that of the slowest host, from a common start. There is no backward beside it,
so this is the cost of communication and of the arithmetic of a method, and not of a step. Beside it stands what was
sent in some more synchronisations, as a multiple of what the ledger says by its formula: on the interface, which counts
the headers of a piece of up to 64 KiB once, and on the link, whose shaper counts those of every frame. Then, without a
network, what gathering a fifth of the entries and putting them back costs against one plain copy of the bucket.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_comm.core.compression.payload import break_even_bytes_per_s, sent_bytes
from lightning_comm.lab.cluster import Lab, unavailable
from lightning_comm.reports.pieces import text_table

_LAYERS = 25  # of equal size, in a bucket
_COUNTED = 3  # synchronisations whose bytes are counted on the interfaces
_METHODS = (
    "full",
    "bf16",
    "int8",
    "ternary",
    "topk 1 %",
    "powersgd 2",
    "mask 20 %",
    "mask 20 %, bf16",
    "mask 20 %, int8",
    "mask 20 %, ternary",
)


def compressions() -> dict[str, Any]:
    """Return each method by its label."""
    from lightning_comm import Cast, Int8, PowerSGD, SparseMask, Ternary, TopK
    from lightning_comm.transport.compression.full import Full

    made = (
        Full(),
        Cast("bf16"),
        Int8(),
        Ternary(),
        TopK(0.01),
        PowerSGD(2),
        SparseMask(),
        SparseMask(then=Cast("bf16")),
        SparseMask(then=Int8()),
        SparseMask(then=Ternary()),
    )
    return dict(zip(_METHODS, made, strict=True))


def layout_of(mib: float) -> Any:
    """Return a bucket of square layers, and parameters for masks."""
    from lightning_comm.transport.compression.base import Layout, Slot

    side = round((mib * 2**18 / _LAYERS) ** 0.5)
    return Layout(tuple(Slot(f"layer{k}.weight", side * side, (side, side)) for k in range(_LAYERS)))


def codec_of(compression: Any, layout: Any, recorder: Any) -> Any:
    """Return the method's codec, with a random mask of a fifth of the weights where it wants one."""
    import torch

    from lightning_comm.transport.compression.base import Context
    from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec

    codec = compression.codec(Context(recorder, "gradients"))
    if isinstance(codec, SparseMaskCodec):
        generator = torch.Generator().manual_seed(0)
        masks = {slot.name: torch.rand(slot.shape, generator=generator) < 0.2 for slot in layout.slots}
        codec.install(masks, [(slot.name, torch.nn.Parameter(torch.empty(slot.shape))) for slot in layout.slots])
    return codec


def as_host(mib: float, repeats: int) -> dict[str, Any]:
    """Synchronise on this host; return the seconds of each method, by the slowest host, its payload and wire bytes."""
    import torch
    import torch.distributed as dist

    from lightning_comm.core.ledger import CommLedger
    from lightning_comm.transport.recording import Recorder

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    layout = layout_of(mib)
    ledgers = {name: CommLedger() for name in _METHODS}
    codecs = {
        name: codec_of(compression, layout, Recorder(ledgers[name])) for name, compression in compressions().items()
    }
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    seconds: dict[str, list[float]] = {name: [] for name in _METHODS}
    for repeat in range(repeats + 1):  # the first one opens connections and makes plans
        for turn in range(len(_METHODS)):
            name = _METHODS[(turn + repeat) % len(_METHODS)]
            time.sleep(0.05)  # queues run empty
            seconds[name].append(_synchronise(codecs[name], gradient.clone(), layout))
    slowest = torch.tensor([seconds[name][1:] for name in _METHODS], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    wire = {name: _count_wire(codecs[name], gradient, layout, ledgers[name]) for name in _METHODS}
    payload = {name: codec.payload_bytes(layout) for name, codec in codecs.items()}
    dist.destroy_process_group()
    return {"seconds": dict(zip(_METHODS, slowest.tolist(), strict=True)), "payload_bytes": payload, "wire": wire}


def _synchronise(codec: Any, values: Any, layout: Any) -> float:
    import torch.distributed as dist

    from lightning_comm.transport.compression.base import run_alone

    dist.barrier()
    began = time.perf_counter()
    codec.begin_step()
    run_alone(codec.mean(values, layout))
    codec.end_step()
    return time.perf_counter() - began


def _count_wire(codec: Any, gradient: Any, layout: Any, ledger: Any) -> dict[str, float]:
    """Return what all hosts sent in some synchronisations, by their interfaces and by the ledger's formula."""
    import torch
    import torch.distributed as dist
    from emulated_steps import interface_sent_bytes

    dist.barrier()
    time.sleep(0.05)  # acknowledgements are through
    before = torch.tensor([interface_sent_bytes(), _link_sent_bytes(), ledger.wire_bytes()], dtype=torch.float64)
    for _ in range(_COUNTED):
        _synchronise(codec, gradient.clone(), layout)
    dist.barrier()
    time.sleep(0.05)
    after = torch.tensor([interface_sent_bytes(), _link_sent_bytes(), ledger.wire_bytes()], dtype=torch.float64)
    sent = (after - before) / _COUNTED
    dist.all_reduce(sent)
    return dict(zip(("interface_bytes", "link_bytes", "formula_bytes"), sent.tolist(), strict=True))


def _link_sent_bytes() -> int:
    """Return what has gone through the shaper of this host's link, with the headers of every frame."""
    from emulated_steps import interface

    said = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", interface()], capture_output=True, check=True)
    return sum(int(each["bytes"]) for each in json.loads(said.stdout) if each.get("root"))


def packing(mib: float, repeats: int) -> dict[str, float]:
    """Return the seconds of a plain copy of a bucket, and of gathering a fifth of it and putting that back."""
    import torch

    torch.set_num_threads(1)
    entries = round(mib * 2**18)
    bucket, other = torch.randn(entries), torch.empty(entries)
    kept = (torch.rand(entries, generator=torch.Generator().manual_seed(0)) < 0.2).nonzero().view(-1)
    times: dict[str, list[float]] = {"copy": [], "pack and unpack": []}
    for _ in range(repeats):
        began = time.perf_counter()
        other.copy_(bucket)
        times["copy"].append(time.perf_counter() - began)
        began = time.perf_counter()
        row = bucket.index_select(0, kept)
        bucket.zero_().scatter_(0, kept, row)
        times["pack and unpack"].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def arithmetic(mib: float, repeats: int) -> dict[str, float]:
    """Return the seconds that each method takes for a bucket where nothing is sent: in a group of one process."""
    import torch
    import torch.distributed as dist

    from lightning_comm.core.ledger import CommLedger
    from lightning_comm.transport.recording import Recorder

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = layout_of(mib)
    codecs = {name: codec_of(made, layout, Recorder(CommLedger())) for name, made in compressions().items()}
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in codecs}
    for _ in range(repeats + 1):
        for name, codec in codecs.items():
            times[name].append(_synchronise(codec, gradient.clone(), layout))
    dist.destroy_process_group()
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def break_even_rows(seconds: dict[str, float], mib: float, hosts: int) -> list[list[str]]:
    """Return a line for each method: its arithmetic, what a host sends, and the links on which that pays."""
    kept = (round(0.2 * layout_of(mib).numel),)
    whole = [slot.shape for slot in layout_of(mib).slots]
    words = {"topk 1 %": "topk", "powersgd 2": "powersgd"}
    sent = {
        name: sent_bytes(words.get(name.split(", ")[-1], name.split(", ")[-1]), [kept], hosts)
        if name.startswith("mask 20 %, ")
        else sent_bytes("full", [kept], hosts)
        if name.startswith("mask")
        else sent_bytes(words.get(name, name), whole, hosts)
        for name in seconds
    }
    rows = []
    for name, own_s in seconds.items():
        row = [name, f"{1e3 * own_s:.1f} ms", f"{sent[name] / 1e6:.2f} MB"]
        for other in ("full", "bf16"):
            rate = break_even_bytes_per_s(sent[other], sent[name], max(0.0, own_s - seconds[other]))
            row.append("" if rate == 0 else "any" if rate == float("inf") else f"{8e-9 * rate:.1f} Gbit/s")
        rows.append(row)
    return rows


def over_formula(wire: dict[str, float], place: str) -> float:
    """Return the bytes that were counted somewhere as a multiple of those of the formula."""
    return wire[f"{place}_bytes"] / wire["formula_bytes"]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Return a line for each method: payload, times, their ratio to sending in full, and what was sent over formula."""
    full = result["seconds"]["full"]
    rows = []
    for name, seconds in result["seconds"].items():
        ratios = [dense / own for dense, own in zip(full, seconds, strict=True)]  # paired by repeat
        rows.append(
            [
                name,
                f"{result['payload_bytes'][name] / 1e6:.2f} MB",
                f"{1e3 * statistics.median(seconds):.0f} ms",
                f"{1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}",
                f"{statistics.median(ratios):.2f}",
                *(f"{over_formula(result['wire'][name], place):.3f}" for place in ("interface", "link")),
            ]
        )
    return rows


def main() -> None:
    """Measure everything and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--links", nargs="*", default=["100mbit"], help="none: only what needs no network")
    parser.add_argument("--mib", type=float, default=25.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-host", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_host:
        answer = as_host(options.mib, options.repeats)
        if os.environ["RANK"] == "0":
            print(json.dumps(answer), flush=True)
        return
    found: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    found["packing_s"] = packing(options.mib, 4 * options.repeats + 1)
    copy_s, pack_s = found["packing_s"].values()
    print(
        f"A bucket of {options.mib:g} MiB, one thread: a copy takes {1e3 * copy_s:.1f} ms; a fifth of it gathered and "
        f"put back {1e3 * pack_s:.1f} ms, {pack_s / copy_s:.2f} copies."
    )
    found["arithmetic_s"] = arithmetic(options.mib, 2 * options.repeats + 1)
    print(f"\nThe same bucket by each method, one thread, nothing sent; then what a host of {options.hosts} sends")
    header = ["method", "arithmetic", "sent", "pays below, against full", "against bf16"]
    print(text_table(header, break_even_rows(found["arithmetic_s"], options.mib, options.hosts)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not options.links:
        return
    if (missing := unavailable()) is not None:
        sys.exit(f"The rest needs emulated hosts: {missing}")
    header = [
        "method",
        "payload",
        "median",
        "lowest to highest, ms",
        "times as fast as in full",
        "interface / formula",
        "link / formula",
    ]
    for link in options.links:
        command = [sys.executable, __file__, "--as-host", "--mib", str(options.mib), "--repeats", str(options.repeats)]
        with Lab(options.hosts, link) as lab:
            done = lab.run(command, timeout_s=1800)
        if done.returncode != 0:
            sys.exit(f"{done.why}:\n{''.join(done.output)}")
        found[link] = json.loads(done.output[0].strip().splitlines()[-1])
        print(f"\n{options.hosts} hosts, {link}; a bucket of {options.mib:g} MiB; {options.repeats} repeats")
        print(text_table(header, rows_of(found[link])))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
