"""Part 5 of `gpu_check.py`: how often the host waits for the device, in a synchronisation, a step, and a backward.

On CUDA torch itself says where (`set_sync_debug_mode`); it passes over `synchronize` of streams, events and the device,
so these are noted besides. On a CPU a mock of the device counts the same.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
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
_TORCH = str(Path(torch.__file__).parent)


class Case(NamedTuple):
    """Something whose waits are counted.

    Args:
        make: Prepares it on a device, and returns what is counted.
        most: How many waits were expected at most, before it was run.

    """

    make: Callable[[str], Step]
    most: int


class Wait(NamedTuple):
    """Something that the host waited for, as the mock device has it too.

    Args:
        kind: What it was.
        where: File and line of the innermost frame of the package; `""` where there is none.
        by: File and line of the innermost frame outside of torch.
        in_backward: Whether a backward was under way in this thread.
        thread: The name of the thread.

    """

    kind: str
    where: str
    by: str
    in_backward: bool
    thread: str

    @property
    def own(self) -> bool:
        """Whether the package itself asked for it, and not what it called."""
        return self.where != "" and self.where == self.by


def _wait(kind: str) -> Wait:
    """Return the wait that the caller's caller has just made."""
    frame, where, by = sys._getframe(2), "", ""
    while frame is not None and not (where and by):
        name = frame.f_code.co_filename
        inside = "/lightning_comm/" in name
        place = (
            f"{'lightning_comm/' * inside}{name.rsplit('/lightning_comm/' if inside else '/', 1)[-1]}:{frame.f_lineno}"
        )
        if name != __file__ and not name.startswith(_TORCH) and "<" not in name and "/contextlib" not in name:
            by = by or place
        where = where or place * inside
        frame = frame.f_back  # type: ignore[assignment]
    return Wait(kind, where, by, torch._C._current_graph_task_id() != -1, threading.current_thread().name)


@contextmanager
def _torch_tells(found: list[Any]) -> Iterator[None]:
    """Collect where the host waits, as torch warns of it, and where somebody asks for it."""

    def noted(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(_wait("torch"))

    def noting(owner: Any, name: str) -> Any:
        plain = getattr(owner, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            of_what = args[0] if args else None
            if not (isinstance(of_what, (torch.cuda.Event, torch.cuda.Stream)) and of_what.query()):
                found.append(_wait(name))  # what is over already is not waited for
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
    found: list[Any] = []
    with _torch_tells(found):
        yield device, found


def waits_of(work: Step, device: str) -> list[str] | None:
    """Return where the host waits during some work; `None` on a CPU, where nothing counts."""
    if device == "cpu":
        return None
    found: list[Any] = []
    with _torch_tells(found):
        work()
    return [told(wait) for wait in found]


# ---- cases -----------------------------------------------------------------------------------------------------------


def _tensors(device: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layer{k}": torch.randn(16, 16, generator=draw).to(device) for k in range(26)}  # as many buckets


def _in_full(device: str) -> Step:
    averager, tensors = Averager(Recorder(CommLedger()), BUCKET_BYTES), list(_tensors(device).values())
    return lambda: averager.average_(tensors, "parameters", moderate=True).read()


def _differences(compression: Compression, overlap: bool) -> Callable[[str], Step]:
    def make(device: str) -> Step:
        recorder = Recorder(CommLedger(), another_group(None), hold=True) if overlap else Recorder(CommLedger())
        averager, tensors = DifferenceAverager(recorder, compression, BUCKET_BYTES), _tensors(device)
        averager.restart(tensors)

        def synchronise() -> None:
            for tensor in tensors.values():
                tensor.mul_(1.001)
            if overlap:
                averager.depart(tensors, moderate=True)
                averager.land_(tensors).read()
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


class _Batches(pl.Callback):
    """Notes how many waits there were when each batch began."""

    def __init__(self, waits: list[Any]) -> None:
        self.waits, self.begins = waits, list[int]()

    def on_train_batch_start(self, *_: Any) -> None:
        """Note where a batch begins."""
        self.begins.append(len(self.waits))

    def on_train_end(self, *_: Any) -> None:
        """Note where the last one ends."""
        self.begins.append(len(self.waits))


def fitted(rank: int, device: str, name: str) -> dict[str, Any]:
    """Return the package's own waits in the batch that a case of `host_waits.py` looks at, and all within backwards."""
    import host_waits

    case = host_waits.cases()[name]
    with watched(device, p2p=case.p2p) as (device, waits):
        module, batches = case.module(), _Batches(waits)
        mib = 4 * sum(each.numel() for each in module.parameters()) / 2**20 / host_waits.BUCKETS
        options = case.options()
        runner = pl.Trainer(
            accelerator="gpu", devices=[0], num_nodes=2, strategy=case.strategy(mib), max_steps=host_waits.STEPS + 2,
            callbacks=[batches, *options.pop("callbacks", [])], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
        )  # fmt: skip
        samples = torch.ones(2 * (host_waits.STEPS + 4), 8)
        runner.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(samples), batch_size=2))
        begin, end = batches.begins[case.batch : case.batch + 2]
        later = waits[batches.begins[3] :]
        # threads of the package's own, which carry messages, wait so that training need not
        own = [told(wait) for wait in waits[begin:end] if wait.own and not wait.thread.startswith("lightning_comm")]
        inside = [told(wait) for wait in later if wait.own and wait.in_backward]
        # the group is the device's: leave it here
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return {"waits": own, "in backward": inside, "most": case.most}


def _places(found: list[str]) -> list[str]:
    return sorted({f"{found.count(place)} x {place}" for place in found})[:12]


def _fits(check: Check) -> None:
    """Count in fits of two ranks: the shapes of a ResNet-50, each hook, cyclic, the profiler and the partition."""
    import host_waits

    ranks = Ranks(2, check.device, exact=False)
    try:
        names = list(host_waits.cases())
        for name in names[:: 6 if check.tiny else 1]:
            try:
                found = ranks.call(fitted, check.device, name, timeout_s=60 if check.device == "cuda" else 300)[0]
            except AssertionError as error:
                check.note(f"fit: {name}", str(error).strip().splitlines()[-1][:300], "it runs", "", verdict="fails")
                continue
            check.note(f"fit: {name}: waits of the host", len(found["waits"]), found["most"], "<=")
            if found["waits"]:
                check.note(f"fit: {name}: where", _places(found["waits"]), "as few as can be", "")
            if "cyclic" in name:
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
