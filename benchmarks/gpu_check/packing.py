"""Part 6 of the check: what packing and unpacking cost beside a plain copy, and codecs beside a cast to bf16.

Judged is the device's time for packing and unpacking alone, which is bound by its memory: by their bytes they take as
long as the floor where nothing is divided, and half as long again where two ranks divide, besides launches. A whole
average is a matter of the host where nothing travels; its time is given, and not judged.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.distributed as dist
from support.on_device import Ranks, backend_of, spin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any

from benchmarks.gpu_check.report import Check
from benchmarks.gpu_check.sanity import copy_rate, seconds_of
from benchmarks.gpu_check.waits import waits_of
from lightning_comm import Cast, Int8, PowerSGD, Ternary, TopK
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.buckets import cut_into_buckets, pack, write_means
from lightning_comm.ondevice.flat import Flat
from lightning_comm.transport.averaging import IN_FLIGHT, FullAverage
from lightning_comm.transport.compression.base import Context, Layout, Slot, run_alone
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.recording import Recorder

MODELS = {False: ("resnet50", "vit_base_patch16_224"), True: ("test_vit",)}
BUCKETS_MIB = (1, 4, 16, 25, 64, 256)  # 25 is the default for NCCL
DEFAULT_MIB = 25
GROUPS = ("one rank", "fake group of 8", "two ranks by gloo")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = 1.5  # how many times as long as the copies alone packing and unpacking may take; by their bytes it is 1
DIVIDED = 1.5  # what it is by the bytes where two ranks divide: 24 an entry of float32, and not 16; launches come to it
CODECS = (Cast("bf16"), Full(), Cast("fp16"), Int8(), Ternary(), TopK(0.01), PowerSGD(2))


def shapes_of(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters."""
    with torch.device("meta"):
        return [tuple(each.shape) for each in timm.create_model(name).parameters()]


def moved_bytes(entries: int, dtype: torch.dtype) -> int:
    """Return what is read and written by packing into float32 and unpacking, and by nothing else.

    >>> moved_bytes(1, torch.float32), moved_bytes(1, torch.bfloat16)
    (16, 12)
    """
    return 2 * entries * (dtype.itemsize + 4)


class Launches(TorchDispatchMode):
    """Counts operations on tensors of a device, views left out: on CUDA each is a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        self.count += not is_view and tree_any(lambda each: isinstance(each, torch.Tensor), args)
        return func(*args, **(kwargs or {}))


def device_seconds_of(work: Callable[[], Any], device: str, repeats: int = 5) -> tuple[float, int]:
    """Return the median time of some work on the device alone, and how often the host was ahead of it.

    The device is busy while the host enqueues the work, so that it finds all kernels waiting. Where the host was not
    done by then, the device is kept busy for longer; a CPU has no such thing.
    """
    if device == "cpu":
        return seconds_of(work, device, repeats), 0
    times, busy_ms, ahead = [], 20.0, 0
    for _ in range(repeats + 1):  # the first warms up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        spin(device, busy_ms)
        start.record()
        work()
        was_ahead = not start.query()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
        ahead += was_ahead and len(times) > 1
        busy_ms *= 1 if was_ahead else 2
    return statistics.median(times[1:]), ahead


def host_seconds_of(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Return the median time until the host has enqueued some work, on a device that has nothing to do."""
    times = []
    for _ in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def packing_of(tensors: list[torch.Tensor], bucket_bytes: int, ranks: int) -> Callable[[], None]:
    """Return what packs tensors into buckets and unpacks them, as an average of so many ranks does, without a message.

    As there, three buckets are in use: so a bucket is read again when others have been written, and not from a cache.
    """
    rows = [Flat.of(each).entries for each in tensors]
    buckets = list(cut_into_buckets(rows, bucket_bytes // 4))  # in float32
    scratch = [torch.empty(bucket_bytes // 4, device=rows[0].device) for _ in range(IN_FLIGHT)]
    divisor = torch.full((), float(ranks), device=rows[0].device) if ranks > 1 else None

    def work() -> None:
        travelling: deque[tuple[list[torch.Tensor], torch.Tensor]] = deque()
        for turn, pieces in enumerate(buckets):
            if len(travelling) == IN_FLIGHT:
                write_means(*travelling.popleft(), divisor)
            travelling.append((pieces, pack(pieces, scratch[turn % IN_FLIGHT])))
        while travelling:
            write_means(*travelling.popleft(), divisor)

    return work


def _average(tensors: list[torch.Tensor], bucket_bytes: int) -> Callable[[], Any]:
    averager, named = FullAverage(Recorder(CommLedger()), bucket_bytes), {str(k): t for k, t in enumerate(tensors)}
    return lambda: averager.average_(named, moderate=True)  # as in a run of which nothing is huge


def packed(
    rank: int, device: str, name: str, dtype: torch.dtype, sizes_mib: tuple[float, ...], mib: int
) -> dict[str, Any]:
    """Pack and unpack a model's parameters, alone; return the seconds on the device for each size of bucket."""
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes_of(name)]
    found: dict[str, Any] = {"entries": sum(each.numel() for each in tensors), "rate": copy_rate(device, mib)}
    for size in sizes_mib:
        for ranks in (1, 2):
            work = packing_of(tensors, int(size * 2**20), ranks)
            seconds, ahead = device_seconds_of(work, device)
            with Launches() as launches:
                work()
            found[f"{size}, {ranks}"] = {"seconds": seconds, "ahead": ahead, "launches": launches.count}
    return found


def synchronised(
    rank: int, device: str, name: str, dtype: torch.dtype, sizes_mib: tuple[float, ...], fake: bool, timed: bool
) -> dict[str, Any]:
    """Average a model's parameters in buckets of each size; return seconds, those of the host, launches, and waits."""
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes_of(name)]
    found: dict[str, Any] = {}
    for size in sizes_mib:
        average = _average(tensors, int(size * 2**20))
        average()  # makes its buckets
        with Launches() as launches:
            average().read()
        waits = waits_of(lambda average=average: average().read(), device)  # type: ignore[misc]
        found[str(size)] = {"launches": launches.count, "waits": None if waits is None else len(waits)}
        if timed:
            found[str(size)]["host"] = host_seconds_of(average, device)
            found[str(size)]["seconds"] = seconds_of(lambda average=average: average().read(), device, 5)  # type: ignore[misc]
    if fake:
        dist.destroy_process_group()
    return found


def encoded(rank: int, device: str, mib: float) -> dict[str, float]:
    """Return the seconds that each codec takes for a bucket of square layers, with what one rank sends to itself."""
    side = round((mib * 2**18 / 25) ** 0.5)
    layout = Layout(tuple(Slot(f"layer{k}.weight", side * side, (side, side)) for k in range(25)))
    values, found = torch.randn(layout.numel, device=device), {}
    for compression in CODECS:
        codec = compression.codec(Context(Recorder(CommLedger()), "gradients", feedback=False))

        def step(codec: Any = codec) -> None:
            codec.begin_step()
            run_alone(codec.mean(values.clone(), layout))
            codec.end_step()

        found[repr(compression)] = seconds_of(step, device, 5)
    return found


def _report_packing(check: Check, name: str, kind: str, found: dict[str, Any]) -> None:
    """Judge a plain pack and unpack of the larger model; note what a division adds, and all else."""
    floor_s = moved_bytes(found.pop("entries"), TYPES[kind]) / found.pop("rate")
    for case, each in found.items():
        size, ranks = case.split(", ")
        times = each["seconds"] / floor_s
        figures = {"times the floor": round(times, 3), "ms": round(1e3 * each["seconds"], 4)}
        figures |= {"floor, ms": round(1e3 * floor_s, 4), "host ahead": f"{each['ahead']} of 5"}
        figures |= {"operations": each["launches"]}
        label = f"{name}, {kind}, packing and unpacking alone, buckets of {size} MiB"
        if ranks == "2":
            expected = f"by its bytes {DIVIDED} times the floor, and launches" if kind == "fp32" else "no bound"
            check.note(f"{label}, divided by 2", figures, expected, "not judged:")
            continue
        judged = name.startswith("vit") and (kind, int(size)) == ("fp32", DEFAULT_MIB) and not check.tiny
        verdict = ("ok" if times <= FLOORS else "fails") if judged else None
        expected = f"{FLOORS} times the floor; by its bytes 1, and launches" if judged else "no bound"
        check.note(label, figures, expected, "at most", verdict=verdict)


def _report(check: Check, name: str, kind: str, group: str, found: dict[str, Any]) -> None:
    for size, each in found.items():
        label = f"{name}, {kind}, {group}, an average in buckets of {size} MiB"
        check.note(label, {"operations": each["launches"], "host waits": each["waits"]}, "no bound", "")
        if "host" in each:
            figures = {"of the host until all is enqueued": 1e3 * each["host"], "of the whole": 1e3 * each["seconds"]}
            check.note(f"{label}: ms", figures, "a matter of the host", "not judged:")
    waits = [each["waits"] for each in found.values()]
    if None not in waits:
        check.note(f"{name}, {kind}, {group}: host waits, whatever the buckets", max(waits), 1, "<=")


def _sizes(check: Check, group: str) -> tuple[int, ...]:
    return (1, 25) if check.tiny else BUCKETS_MIB if group == GROUPS[0] else (4, 25, 256)


def run(check: Check) -> None:
    """Measure each model, type, group and bucket size; then codecs."""
    device, mib = check.device, 16 if check.tiny else 1024
    one = Ranks(1, device, backend_of(device), exact=False)
    groups = {GROUPS[0]: one, GROUPS[1]: Ranks(1, device, exact=False)}
    groups[GROUPS[2]] = Ranks(2, device, "gloo", exact=False)
    models = [(name, kind) for name in MODELS[check.tiny] for kind in TYPES]
    try:
        for name, kind in models:
            arguments: tuple[Any, ...] = (device, name, TYPES[kind], _sizes(check, GROUPS[0]), mib)
            _report_packing(check, name, kind, one.call(packed, *arguments, timeout_s=120)[0])
        for group, ranks in groups.items():
            alone = group != GROUPS[2]  # two processes that share a device: their times mean nothing
            for name, kind in models:
                arguments = (device, name, TYPES[kind], _sizes(check, group), group == GROUPS[1], alone)
                if alone or kind == "fp32":
                    _report(check, name, kind, group, ranks.call(synchronised, *arguments, timeout_s=120)[0])
            if group != GROUPS[0]:
                ranks.close()
        size = 0.25 if check.tiny else 25
        (found,) = one.call(encoded, device, size, timeout_s=120)
        for name, seconds in found.items():
            figures = {
                "times Cast('bf16')": round(seconds / found[repr(CODECS[0])], 2),
                "us a MiB": 1e6 * seconds / size,
            }
            check.note(f"codec {name}, one rank", figures, "no bound", "to compare methods")
    finally:
        for ranks in groups.values():
            ranks.close()
