"""Part 6 of `gpu_check.py`: what packing and unpacking cost beside a plain copy, and codecs beside a cast to bf16."""

from typing import Any

import timm
import torch
import torch.distributed as dist
from gpu_check_report import Check
from gpu_check_sanity import copy_rate, seconds_of
from gpu_check_waits import waits_of
from support.on_device import Ranks, backend_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any

from lightning_comm import Cast, Int8, PowerSGD, Ternary, TopK
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averager
from lightning_comm.transport.compression.base import Context, Layout, Slot, run_alone
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.recording import Recorder

MODELS = {False: ("resnet50", "vit_base_patch16_224"), True: ("test_vit",)}
BUCKETS_MIB = (1, 4, 16, 25, 64, 256)  # 25 is the default for NCCL
DEFAULT_MIB = 25
GROUPS = ("one rank", "fake group of 8", "two ranks by gloo")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = 1.5  # how many times as long as the copies alone a synchronisation by NCCL of one rank may take
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


def synchronised(
    rank: int, device: str, name: str, dtype: torch.dtype, sizes_mib: tuple[float, ...], fake: bool, mib: int
) -> dict[str, Any]:
    """Average a model's parameters in buckets of each size; return seconds, launches, waits, and a copy's rate."""
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes_of(name)]
    found: dict[str, Any] = {"entries": sum(each.numel() for each in tensors), "rate": copy_rate(device, mib)}
    for size in sizes_mib:
        averager = Averager(Recorder(CommLedger()), int(size * 2**20))

        def average(averager: Averager = averager) -> None:
            averager.average_(tensors, "parameters", moderate=True).read()  # as in a run of which nothing is huge

        seconds = seconds_of(average, device, 5)
        with Launches() as launches:
            average()
        waits = waits_of(average, device)
        found[str(size)] = {
            "seconds": seconds,
            "launches": launches.count,
            "waits": None if waits is None else len(waits),
        }
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


def _report(check: Check, name: str, kind: str, group: str, found: dict[str, Any]) -> None:
    floor_s = moved_bytes(found["entries"], TYPES[kind]) / found["rate"]
    for size in BUCKETS_MIB:
        if str(size) not in found:
            continue
        each = found[str(size)]
        times = each["seconds"] / floor_s
        label = f"{name}, {kind}, {group}, buckets of {size} MiB"
        judged = name.startswith("vit") and (group, kind, size) == (GROUPS[0], "fp32", DEFAULT_MIB) and not check.tiny
        figures = {"times the floor": round(times, 3), "ms": round(1e3 * each["seconds"], 4)}
        figures |= {"floor, ms": round(1e3 * floor_s, 4), "operations": each["launches"], "host waits": each["waits"]}
        verdict = ("ok" if times <= FLOORS else "fails") if judged else None
        check.note(label, figures, f"{FLOORS} times the floor" if judged else "no bound", "at most", verdict=verdict)
    waits = [found[str(size)]["waits"] for size in BUCKETS_MIB if str(size) in found]
    if None not in waits:
        most = max(waits)
        check.note(f"{name}, {kind}, {group}: host waits, whatever the buckets", most, 1, "<=")


def run(check: Check) -> None:
    """Measure each model, type, group and bucket size; then codecs."""
    device, mib = check.device, 16 if check.tiny else 1024
    one = Ranks(1, device, backend_of(device), exact=False)
    groups = {GROUPS[0]: one, GROUPS[1]: Ranks(1, device, exact=False)}
    groups[GROUPS[2]] = Ranks(2, device, "gloo", exact=False)
    try:
        for group, ranks in groups.items():
            for name in MODELS[check.tiny]:
                for kind, dtype in TYPES.items():
                    if group == GROUPS[2] and kind == "bf16":
                        continue  # goes through the host: its times are gloo's, and not of interest
                    sizes = (1, 25) if check.tiny else BUCKETS_MIB if group == GROUPS[0] else (4, 25, 256)
                    arguments = (device, name, dtype, sizes, group == GROUPS[1], mib)
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
