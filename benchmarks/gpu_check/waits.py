"""Part 5 of the check: how often the host waits for the device, in a synchronisation, a step, and a backward.

On CUDA torch itself says where (`set_sync_debug_mode`), for `synchronize` of a stream too; it passes over that of
events and of the device. All three are noted when they are called, and torch's word for one of them is not counted
again. On a CPU a mock of the device counts the same.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from support import device_cyclic
from support.mock_cuda_record import wait_of_now
from support.on_device import MOCKED, Ranks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_check.report import Check
from lightning_comm import Cast, Int8, PowerSGD, Ternary, TopK
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.cyclic import CyclicEngine
from lightning_comm.transport.averaging import FullAverage
from lightning_comm.transport.background_thread import BackgroundStreams
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.ddp_hook import GradientSync
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


@contextmanager
def torch_tells(found: list[Any]) -> Iterator[None]:
    """Collect where the host waits, as torch warns of it, and where somebody asks for it."""
    here = threading.local()

    def noted(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message) and not getattr(here, "asked", False):
            found.append(wait_of_now("torch"))

    def noting(owner: Any, name: str) -> Any:
        plain = getattr(owner, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            of_what = args[0] if args else None
            if not (isinstance(of_what, (torch.cuda.Event, torch.cuda.Stream)) and of_what.query()):
                found.append(wait_of_now(name))  # what is over already is not waited for
            here.asked = True
            try:
                return plain(*args, **kwargs)
            finally:
                here.asked = False

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


def told(wait: Any) -> str:
    """Return a wait as a text."""
    return f"{wait.where or wait.by} {wait.kind}{' in backward' * wait.in_backward}"


@contextmanager
def watched(device: str, *, p2p: bool = False) -> Iterator[tuple[str, list[Any]]]:
    """Yield a device and the list that its waits are added to: on a CPU that of a mock.

    Args:
        device: That of the check.
        p2p: Whether ranks send to one other rank, and the mock lets gloo do so with its tensors.

    """
    if device == "cpu":
        from support.mock_cuda import mock_cuda

        with mock_cuda(p2p=p2p) as mocked:
            yield "cuda", mocked.waits
        return
    if (there := _the_mock()) is not None:  # which torch knows nothing of
        there.p2p = p2p
        yield device, there.waits
        return
    found: list[Any] = []
    with torch_tells(found):
        yield device, found


def _the_mock() -> Any:
    """Return the device that is not there, if there is no other."""
    if os.environ.get(MOCKED) != "1":
        return None
    from support.mock_cuda_record import active

    return active()


def waits_of(work: Step, device: str) -> list[str] | None:
    """Return where the host waits during some work; `None` on a CPU, where nothing counts."""
    if device == "cpu":
        return None
    with watched(device) as (_, waits):
        before = len(waits)
        work()
        return [told(wait) for wait in waits[before:]]


# ---- cases -----------------------------------------------------------------------------------------------------------


def _tensors(device: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layer{k}": torch.randn(16, 16, generator=draw).to(device) for k in range(26)}  # as many buckets


def _in_full(device: str) -> Step:
    averager, tensors = FullAverage(Recorder(CommLedger()), BUCKET_BYTES), _tensors(device)
    return lambda: averager.average_(tensors, moderate=True).read()


def _differences(compression: Compression, overlap: bool) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        recorder = Recorder(CommLedger(), another_group(None), hold=True) if overlap else Recorder(CommLedger())
        averager, tensors = CompressedAverage(recorder, compression, BUCKET_BYTES), _tensors(device)
        averager.references.restart(tensors)
        streams = BackgroundStreams()

        def synchronise() -> None:
            for tensor in tensors.values():
                tensor.mul_(1.001)
            if overlap:
                departed = averager.depart(tensors, moderate=True)
                streams.start(departed.travel, departed.device).join()
                departed.arrived()
                departed.correct_(tensors)
                departed.drift.read()
            else:
                averager.average_(tensors, moderate=True).read()

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


def counted(rank: int, device: str, name: str) -> list[str]:
    """Return the waits of a case once it has run twice, in which DDP cuts its buckets and state is made."""
    with watched(device) as (device, waits):
        work = CASES[name].make(device)
        for _ in range(2):
            work()
        before = len(waits)
        work()
        return [told(wait) for wait in waits[before:]]


def fitted(rank: int, device: str, name: str, tiny: bool) -> dict[str, Any]:
    """Return the package's own waits where a case of `host_waits` looks, those beside, and all within backwards."""
    from benchmarks.gpu_check import host_waits

    if tiny:
        host_waits.BLOCKS = [1, 1, 1, 1]
    case = host_waits.cases()[name]
    with watched(device, p2p=case.p2p) as (device, waits):
        seen = host_waits.seen_in(case, waits, [])
        # the group is the device's: leave it here
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    parts = {"waits": seen.waits, "beside": seen.beside, "in backward": seen.in_backward}
    return {part: [told(wait) for wait in found] for part, found in parts.items()} | {"most": case.most}


def _places(found: list[str]) -> list[str]:
    return sorted({f"{found.count(place)} x {place}" for place in found})[:12]


def names_of_fits(tiny: bool) -> list[str]:
    """Return the cases of `host_waits`: one of each kind first, in case time is up, or those alone."""
    from benchmarks.gpu_check import host_waits

    return [*host_waits.KINDS, *(name for name in host_waits.cases() if name not in host_waits.KINDS and not tiny)]


def _fits(check: Check) -> None:
    """Count in fits of two ranks: the shapes of a ResNet-50, each hook, cyclic, the profiler and the partition."""
    ranks = Ranks(2, check.device, exact=False)
    try:
        for name in names_of_fits(check.tiny):
            arguments = (check.device, name, check.tiny)
            try:
                found = ranks.call(fitted, *arguments, timeout_s=60 if check.device == "cuda" else 300)[0]
            except AssertionError as error:
                check.note(f"fit: {name}", str(error).strip().splitlines()[-1][:300], "it runs", "", verdict="fails")
                continue
            check.note(f"fit: {name}: waits of the host", len(found["waits"]), found["most"], "<=")
            for part, what in (("waits", "where"), ("beside", "where, in threads of its own")):
                if found[part]:
                    check.note(f"fit: {name}: {what}", _places(found[part]), "as few as can be", "")
            check.note(f"fit: {name}: waits in backward", len(found["in backward"]), 0, "==")
    finally:
        ranks.close()


def run(check: Check) -> None:
    """Count the waits of each case with two ranks by gloo, which share the device."""
    ranks = Ranks(2, check.device, "gloo", exact=False)
    try:
        for name, case in CASES.items():
            try:
                found = ranks.call(counted, check.device, name, timeout_s=60 if check.device == "cuda" else 300)[0]
            except AssertionError as error:
                check.note(name, str(error).strip().splitlines()[-1][:300], case.most, "waits", verdict="fails")
                continue
            check.note(f"{name}: waits of the host", len(found), case.most, "<=")
            if found:
                check.note(f"{name}: where", _places(found), "as few as can be", "")
    finally:
        ranks.close()
    _fits(check)
