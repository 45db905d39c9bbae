"""Part 5 of `gpu_check.py`: how often the host waits for the device, in a synchronisation, a step, and a backward.

On CUDA torch itself says where (`set_sync_debug_mode`); it passes over `synchronize` of streams, events and the device,
so these are noted besides. On a CPU a mock of the device counts the same.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_check_report import Check
from support import device_cyclic
from support.on_device import Ranks
from torch.nn.parallel import DistributedDataParallel

from lightning_comm import Cast, CyclicEngine, Int8, PowerSGD, Ternary, TopK
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averager
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.differences import DifferenceAverager
from lightning_comm.transport.gradient_sync import GradientSync
from lightning_comm.transport.recording import Recorder, another_group

BUCKET_BYTES = 1024
SENT: tuple[Compression, ...] = (Full(), Cast("bf16"), Cast("fp16"), Int8(), TopK(0.1), PowerSGD(2))
Step = Callable[[], Any]


class Case(NamedTuple):
    """Something whose waits are counted.

    Args:
        make: Prepares it on a device, and returns what is counted.
        most: How many waits were expected at most, before it was run.

    """

    make: Callable[[str], Step]
    most: int


def _place() -> str:
    """Return file and line of the innermost frame of the package, or of this script's folder."""
    frame, here = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/lightning_comm/" in name:
            return f"lightning_comm/{name.rsplit('/lightning_comm/', 1)[1]}:{frame.f_lineno}"
        if not here and ("/benchmarks/" in name or "/tests/" in name) and name != __file__:
            here = f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return here or "elsewhere"


@contextmanager
def _torch_tells(found: list[str]) -> Iterator[None]:
    """Collect where the host waits, as torch warns of it, and where somebody asks for it."""

    def noted(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(_place())

    def noting(owner: Any, name: str) -> Any:
        plain = getattr(owner, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            found.append(f"{_place()} {name}")
            return plain(*args, **kwargs)

        return mock.patch.object(owner, name, asked)

    with (
        warnings.catch_warnings(), noting(torch.cuda, "synchronize"), noting(torch.cuda.Stream, "synchronize"),
        noting(torch.cuda.Event, "synchronize"),
    ):  # fmt: skip
        warnings.simplefilter("always")
        warnings.showwarning = noted
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of(work: Step, device: str, mocked: Any = None) -> list[str] | None:
    """Return where the host waits during some work; `None` on a CPU, where nothing counts, but for a mock that does."""
    if mocked is not None:
        with mocked.counting() as waits:
            work()
        return [f"{wait.where or wait.by} {wait.kind}" for wait in waits]
    if device == "cpu":
        return None
    found: list[str] = []
    with _torch_tells(found):
        work()
    return found


# ---- cases -----------------------------------------------------------------------------------------------------------


def _tensors(device: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layer{k}": torch.randn(16, 12, generator=draw).to(device) for k in range(60)}  # 45 buckets


def _in_full(device: str) -> Step:
    averager, tensors = Averager(Recorder(CommLedger()), BUCKET_BYTES), list(_tensors(device).values())
    return lambda: averager.average_(tensors, "parameters")


def _differences(compression: Compression, overlap: bool) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        recorder = Recorder(CommLedger(), another_group(None), hold=True) if overlap else Recorder(CommLedger())
        averager, tensors = DifferenceAverager(recorder, compression, BUCKET_BYTES), _tensors(device)
        averager.restart(tensors)

        def synchronise() -> None:
            for tensor in tensors.values():
                tensor.mul_(1.001)
            if overlap:
                averager.depart(tensors)
                averager.land_(tensors)
            else:
                averager.average_(tensors)

        return synchronise

    return make


def _hook(compression: Compression) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(24, 24) for _ in range(12)]
        model = torch.nn.Sequential(*layers).to(device)
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.004)
        codec = compression.codec(Context(Recorder(CommLedger()), "gradients"))
        ddp.register_comm_hook(None, GradientSync(codec, Recorder(CommLedger()), model.named_parameters()).hook)
        optimizer, batch = torch.optim.SGD(model.parameters(), 0.01), torch.ones(8, 24).to(device)

        def step() -> None:
            optimizer.zero_grad()
            ddp(batch).square().mean().backward()
            optimizer.step()

        return step

    return make


def _engine(device: str) -> Step:
    net = device_cyclic.model(4, torch.float32).to(device)
    turns = CyclicEngine(net, torch.optim.SGD(net.parameters(), 0.01), workers=2)
    batches = list(device_cyclic.micro_batches(2, device, torch.float32))
    return lambda: turns.step(batches, device_cyclic.error)


CASES: dict[str, Case] = {
    "an average in full": Case(_in_full, 1),
    **{f"an average of differences, {each!r}": Case(_differences(each, False), 1) for each in SENT},
    "an average in the background": Case(_differences(Full(), True), 1),
    **{f"a step of DDP, {each!r}": Case(_hook(each), 1) for each in (*SENT[1:], Ternary())},
    "a step of CyclicEngine": Case(_engine, 1),
}


def counted(rank: int, device: str, name: str) -> list[str] | None:
    """Count the waits of a case once it has run three times, in which DDP cuts its buckets and state is made."""

    def count(device: str, mocked: Any = None) -> list[str] | None:
        work = CASES[name].make(device)
        for _ in range(3):
            work()
        return waits_of(work, device, mocked)

    if device != "cpu":
        return count(device)
    from support.mock_cuda import mock_cuda

    with mock_cuda() as mocked:
        return count("cuda", mocked)


def run(check: Check) -> None:
    """Count the waits of each case with two ranks by gloo, which share the device."""
    ranks = Ranks(2, check.device, "gloo")
    try:
        for name, case in CASES.items():
            try:
                found = ranks.call(counted, check.device, name, timeout_s=60)[0]
            except AssertionError as error:
                check.note(name, str(error).strip().splitlines()[-1][:300], case.most, "waits", verdict="fails")
                continue
            check.note(f"{name}: waits of the host", len(found), case.most, "<=")
            if found:
                places = sorted({f"{found.count(place)} x {place}" for place in found})
                check.note(f"{name}: where", places[:12], "in lightning_comm, as few as can be", "")
    finally:
        ranks.close()
