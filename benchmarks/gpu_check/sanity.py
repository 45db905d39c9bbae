"""Part 0 of the check: what the machine copies, and whether gloo keeps the order of CUDA streams."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support.on_device import Ranks, spin, the_device

from benchmarks.gpu_check.report import STREAMS, Check

# In bytes a second, of a copy that reads and writes: what the H200's data sheet says (4.8e12 of memory) less a tenth,
# and what PCIe of the fifth generation gives. Before any run.
EXPECTED_COPIES = {
    "device to device": 4.3e12,
    "pinned to device": 5e10,
    "device to pinned": 5e10,
    "pageable to device": 1e10,
}
SHARE = 0.7  # of what was expected: with less, other times of this run mean little
COLLECTIVES = (
    "all_reduce float32",
    "all_reduce bfloat16",
    "all_reduce float16",
    "broadcast",
    "all_gather",
    "all_to_all",
)


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Return the median time of some work, by the device's clock where it has one."""
    times = []
    for _ in range(repeats + 1):  # the first warms up
        if device == "cpu":
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def copy_rate(device: str, mib: int) -> float:
    """Return how many bytes a second are read and written by a copy within the device."""
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def _judge_rate(check: Check, name: str, rate: float, mib: int) -> None:
    """Note a rate; on a GPU it is judged."""
    expected, unit = EXPECTED_COPIES[name], f"bytes a second, {mib} MiB"
    if check.tiny:
        check.note(f"copy, {name}", rate, expected, unit)
    else:
        check.note(f"copy, {name}", rate, SHARE * expected, f">=; {SHARE} of {expected:.3g} {unit}")


def _transfers(check: Check) -> None:
    mib = 16 if check.tiny else 1024
    _judge_rate(check, "device to device", copy_rate(check.device, mib), mib)
    if check.device == "cpu":
        for name in list(EXPECTED_COPIES)[1:]:
            check.needs_cuda(f"copy, {name}", EXPECTED_COPIES[name])
        return
    on_device = torch.ones(mib * 2**17, device=check.device)
    pinned, pageable = torch.ones(on_device.shape, pin_memory=True), torch.ones(on_device.shape)
    works: dict[str, Callable[[], Any]] = {
        "pinned to device": lambda: on_device.copy_(pinned, non_blocking=True),
        "device to pinned": lambda: pinned.copy_(on_device, non_blocking=True),
        "pageable to device": lambda: on_device.copy_(pageable),
    }
    for name, work in works.items():
        rate = on_device.nbytes / seconds_of(work, check.device, 3)
        _judge_rate(check, name, rate, mib // 2)


def futures_keep_their_stream(rank: int, device: str) -> list[float]:
    """Sum ten rows of a million entries, each written behind a busy stream, and read them in a stream of their own.

    Futures of gloo forgot the streams of CUDA tensors in versions of torch before 2026 (pytorch#170812).
    """
    own: Any = torch.cuda.Stream(priority=-1) if device != "cpu" else None  # type: ignore[no-untyped-call]
    found = []
    for turn in range(10):
        row = torch.full((1_000_000,), -1.0, device=device)
        spin(device, 2)
        row.fill_(rank + turn)
        work = dist.all_reduce(row, async_op=True)
        assert work is not None
        if own is None:
            work.get_future().wait()
            found.append(float(row.double().mean()))
            continue
        with torch.cuda.stream(own):
            work.get_future().wait()
            total = row.double().mean()
        own.synchronize()
        found.append(float(total))
    return found


def collectives(rank: int, device: str) -> dict[str, str]:
    """Try each collective that the package uses, with the types that it sends; say what comes of it."""

    def summed(dtype: torch.dtype) -> bool:
        row = torch.full((1000,), rank + 1.0, device=device, dtype=dtype)
        work = dist.all_reduce(row, async_op=True)
        work.wait()  # type: ignore[union-attr]
        return bool((row == 3).all())

    def taken() -> bool:
        row = torch.full((1000,), rank, device=device)
        dist.broadcast(row, 0)
        return bool((row == 0).all())

    def gathered() -> bool:
        rows = torch.empty(2 * 1000, device=device, dtype=torch.uint8)
        dist.all_gather_into_tensor(rows, torch.full((1000,), rank, device=device, dtype=torch.uint8))
        return bool((rows.view(2, 1000)[1] == 1).all())

    def exchanged() -> bool:
        rows, own = torch.empty(2, 500, device=device), torch.full((2, 500), float(rank), device=device)
        dist.all_to_all_single(rows, own)
        return bool((rows[1] == 1).all() and (rows[0] == 0).all())

    types = (torch.float32, torch.bfloat16, torch.float16)
    tries: list[Callable[[], bool]] = [
        *(lambda dtype=dtype: summed(dtype) for dtype in types),
        taken,
        gathered,
        exchanged,
    ]
    found = {}
    for name, attempt in zip(COLLECTIVES, tries, strict=True):
        try:
            found[name] = "right" if attempt() else "wrong"
        except RuntimeError as error:  # all ranks alike: the backend does not know it
            found[name] = f"{error}".splitlines()[0][:120]
    return found


def run(check: Check) -> None:
    """Measure copies, and try gloo with tensors of the device; first what forks, since this process uses the device."""
    ranks = Ranks(2, check.device, "gloo")
    try:
        found = ranks.call(futures_keep_their_stream, check.device)
        rule = "==; if not, parts 2 and 4 prove nothing"
        check.note(STREAMS, found[0], [1.0 + 2 * turn for turn in range(10)], rule)
        for name, said in ranks.call(collectives, check.device)[0].items():
            check.note(f"gloo on {check.device}: {name}", said, "right", "==")
    finally:
        ranks.close()
    with the_device():
        _transfers(check)
