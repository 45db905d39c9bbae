"""What a synchronisation costs under each compression: on emulated hosts, and in packing alone.

    python -m benchmarks.compression.synchronisation [--hosts 4] [--links 100mbit] [--mib 25] [--repeats 5] [--json F]

One bucket of random gradients is synchronised by each method in turn, all in the same processes, in an order that
rotates from repeat to repeat; a time is that of the slowest host, from a common start. There is no backward beside it,
so this is the cost of communication and of the arithmetic of a method, and not of a step. Beside it stands what was
sent in some more synchronisations, as a multiple of what the ledger says by its formula: on the interface, which counts
the headers of a piece of up to 64 KiB once, and on the link, whose shaper counts those of every frame. Then, without a
network, what gathering a fifth of the entries and putting them back costs against one plain copy of the bucket.
"""

import argparse
import json
import statistics
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.kit.environment import environment
from benchmarks.kit.hosts import ask, entry, need_hosts
from benchmarks.kit.options import Parser
from benchmarks.kit.statistics import paired_ratio
from benchmarks.kit.steps import interleaved, seconds_of
from benchmarks.kit.tables import Column, ends, terminal
from lightning_comm.core.compression.payload import break_even_bytes_per_s, sent_bytes
from lightning_comm.lab.cluster import Lab

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


def on_host(options: dict[str, Any]) -> dict[str, Any]:
    """Synchronise on this host; return the seconds of each method, by the slowest host, its payload and wire bytes."""
    import torch
    import torch.distributed as dist

    from lightning_comm.core.ledger import CommLedger
    from lightning_comm.transport.recording import Recorder

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    layout = layout_of(options["mib"])
    ledgers = {name: CommLedger() for name in _METHODS}
    codecs = {
        name: codec_of(compression, layout, Recorder(ledgers[name])) for name, compression in compressions().items()
    }
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(dist.get_rank()))
    seconds: dict[str, list[float]] = {name: [] for name in _METHODS}
    for _, name in interleaved(_METHODS, options["repeats"] + 1):  # the first one opens connections and makes plans
        time.sleep(0.05)  # queues run empty
        seconds[name].append(_synchronise(codecs[name], gradient.clone(), layout))
    slowest = torch.tensor([seconds[name][1:] for name in _METHODS], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    found: dict[str, Any] = {"seconds": dict(zip(_METHODS, slowest.tolist(), strict=True)), "payload_bytes": {}}
    found["wire"] = {name: _count_wire(codecs[name], gradient, layout, ledgers[name]) for name in _METHODS}
    for name, wire in found["wire"].items():
        found["payload_bytes"][name] = wire.pop("payload_bytes") / options["hosts"]
    dist.destroy_process_group()
    return found


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
    """Return what all hosts sent in a synchronisation: by interfaces, by shapers, and by the ledger."""
    import torch
    import torch.distributed as dist

    from benchmarks.kit.training import interface_sent_bytes

    def counted() -> Any:
        dist.barrier()
        time.sleep(0.05)  # acknowledgements are through
        figures = [interface_sent_bytes(), _link_sent_bytes(), ledger.wire_bytes(), ledger.payload_bytes()]
        return torch.tensor(figures, dtype=torch.float64)

    before = counted()
    for _ in range(_COUNTED):
        _synchronise(codec, gradient.clone(), layout)
    sent = (counted() - before) / _COUNTED
    dist.all_reduce(sent)
    names = ("interface_bytes", "link_bytes", "formula_bytes", "payload_bytes")
    return dict(zip(names, sent.tolist(), strict=True))


def _link_sent_bytes() -> int:
    """Return what has gone through the shaper of this host's link, with the headers of every frame."""
    from benchmarks.kit.training import interface

    said = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", interface()], capture_output=True, check=True)
    return sum(int(each["bytes"]) for each in json.loads(said.stdout) if each.get("root"))


def packing(mib: float, repeats: int) -> dict[str, float]:
    """Return the seconds of a plain copy of a bucket, and of gathering a fifth of it and putting that back."""
    import torch

    torch.set_num_threads(1)
    entries = round(mib * 2**18)
    bucket, other = torch.randn(entries), torch.empty(entries)
    kept = (torch.rand(entries, generator=torch.Generator().manual_seed(0)) < 0.2).nonzero().view(-1)

    def pack() -> None:
        row = bucket.index_select(0, kept)
        bucket.zero_().scatter_(0, kept, row)

    times = seconds_of({"copy": lambda: other.copy_(bucket), "pack and unpack": pack}, repeats, warm_up=0)
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
    for _, name in interleaved(codecs, repeats + 1):
        times[name].append(_synchronise(codecs[name], gradient.clone(), layout))
    dist.destroy_process_group()
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def sent_by(name: str, mib: float, hosts: int) -> float:
    """Return what a host sends in a synchronisation by a method, by the formula."""
    layout, words = layout_of(mib), {"topk 1 %": "topk", "powersgd 2": "powersgd", "mask 20 %": "full"}
    method = name.removeprefix("mask 20 %, ")
    shapes = [(round(0.2 * layout.numel),)] if name.startswith("mask") else [slot.shape for slot in layout.slots]
    return sent_bytes(words.get(method, method), shapes, hosts)


def break_even_columns(seconds: dict[str, float], mib: float, hosts: int) -> list[Column]:
    """Return columns for the names of methods: arithmetic, what a host sends, and the links on which that pays."""

    def pays_below(name: str, other: str) -> str:
        added_s = max(0.0, seconds[name] - seconds[other])
        rate = break_even_bytes_per_s(sent_by(other, mib, hosts), sent_by(name, mib, hosts), added_s)
        return "" if rate == 0 else "any" if rate == float("inf") else f"{8e-9 * rate:.1f} Gbit/s"

    return [
        Column("method", str),
        Column("arithmetic", lambda name: f"{1e3 * seconds[name]:.1f} ms"),
        Column("sent", lambda name: f"{sent_by(name, mib, hosts) / 1e6:.2f} MB"),
        Column("pays below, against full", lambda name: pays_below(name, "full")),
        Column("against bf16", lambda name: pays_below(name, "bf16")),
    ]


def over_formula(wire: dict[str, float], place: str) -> float:
    """Return the bytes that were counted somewhere as a multiple of those of the formula."""
    return wire[f"{place}_bytes"] / wire["formula_bytes"]


def columns(result: dict[str, Any]) -> list[Column]:
    """Return columns for the names of methods: payload, times, their ratio to sending in full, what was sent."""
    seconds, wire = result["seconds"], result["wire"]
    return [
        Column("method", str),
        Column("payload", lambda name: f"{result['payload_bytes'][name] / 1e6:.2f} MB"),
        Column("median", lambda name: f"{1e3 * statistics.median(seconds[name]):.0f} ms"),
        Column("lowest to highest, ms", lambda name: ends(seconds[name], 1e3, ".0f")),
        Column("times as fast as in full", lambda name: f"{paired_ratio(seconds['full'], seconds[name]):.2f}"),
        Column("interface / formula", lambda name: f"{over_formula(wire[name], 'interface'):.3f}"),
        Column("link / formula", lambda name: f"{over_formula(wire[name], 'link'):.3f}"),
    ]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.number("--hosts", 4)
    parser.add_argument("--links", nargs="*", default=["100mbit"], help="none: only what needs no network")
    parser.number("--mib", 25.0, "size of the bucket")
    parser.number("--repeats", 5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure everything and print tables."""
    given = options()
    found: dict[str, Any] = {"machine": environment(), "packing_s": packing(given.mib, 4 * given.repeats + 1)}
    copy_s, pack_s = found["packing_s"].values()
    print(
        f"A bucket of {given.mib:g} MiB, one thread: a copy takes {1e3 * copy_s:.1f} ms; a fifth of it gathered and "
        f"put back {1e3 * pack_s:.1f} ms, {pack_s / copy_s:.2f} copies."
    )
    found["arithmetic_s"] = arithmetic(given.mib, 2 * given.repeats + 1)
    print(f"\nThe same bucket by each method, one thread, nothing sent; then what a host of {given.hosts} sends")
    print(terminal(break_even_columns(found["arithmetic_s"], given.mib, given.hosts), found["arithmetic_s"]))
    for link in given.links:
        need_hosts()
        with Lab(given.hosts, link) as lab:
            told = {"mib": given.mib, "repeats": given.repeats, "hosts": given.hosts}
            found[link] = ask(lab, "compression.synchronisation", told)
        print(f"\n{given.hosts} hosts, {link}; a bucket of {given.mib:g} MiB; {given.repeats} repeats")
        print(terminal(columns(found[link]), _METHODS))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    entry(main, on_host)
