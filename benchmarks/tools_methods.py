"""The tools that `tools.py` compares: each trains the same model on the same batches, and synchronises in its own way.

A tool is made on all hosts at once and gives a `Segment`, a function that takes so many optimizer steps and says how
long they took. All use the process group of the host's process; torchft makes groups of its own in it.
"""

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from tools_report import LIMIT, OURS, PLAIN
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_comm import CommLedger, EmulatedDevice, FixedPeriod, LocalUpdateStrategy
from lightning_comm.lab.device import DevicePacer
from lightning_comm.transport.averaging import Averager, Averaging
from lightning_comm.transport.recording import Recorder

TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Timed:
    """A segment on this host: its seconds, bytes sent, overruns of the device and its share of real compute so far."""

    seconds: float
    sent_bytes: int
    overruns: int
    real_share: float


Segment = Callable[[int], Timed]


@dataclass
class Job:
    """What all tools do alike.

    Args:
        model: A name that timm knows.
        image: Height and width of the images.
        batch: Samples of a step on each host.
        step_s: Seconds of forward and backward of a batch on the emulated device.
        period: Steps between synchronisations of the tools that do not synchronise in every step.

    """

    model: str
    image: int
    batch: int
    step_s: float
    period: int
    closing: list[Callable[[], Any]] = field(default_factory=list)

    def network(self) -> nn.Module:
        """Make the model, from the same weights every time."""
        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=100, img_size=self.image)

    def samples(self, steps: int) -> tuple[Tensor, Tensor]:
        """Make images and labels for so many steps, different on each host."""
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        count = self.batch * steps
        images = torch.randn(count, 3, self.image, self.image, generator=generator)
        return images, torch.randint(0, 100, (count,), generator=generator)

    def pacer(self, network: nn.Module) -> DevicePacer:
        """Make the emulated device of this host."""
        pacer = DevicePacer(network, step_s=self.step_s, batch_size=self.batch)
        pacer.attach()
        return pacer


class Meter:
    """Seconds and sent bytes of this host since it was made, on all hosts together."""

    def __init__(self) -> None:
        dist.barrier()
        self._began_bytes, self._began_s = _interface_sent_bytes(), time.perf_counter()

    def read(self) -> tuple[float, int]:
        """Return both."""
        return time.perf_counter() - self._began_s, _interface_sent_bytes() - self._began_bytes


def _interface_sent_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface():
            return int(counters.split()[8])
    raise RuntimeError(f"/proc/net/dev lists no interface {interface()!r}")


def interface() -> str:
    """Return the name of this host's interface in the lab."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "lo")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that all tools use."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)


def loop(
    job: Job,
    network: nn.Module,
    model: nn.Module | None = None,
    optimizer: Any = None,
    after_step: Callable[[], Any] = lambda: None,
) -> Segment:
    """Train ``network``, wrapped as ``model``, in a plain loop."""
    model = network if model is None else model
    optimizer = optimizer_of(network) if optimizer is None else optimizer
    pacer = job.pacer(network)
    images, labels = job.samples(1)

    def segment(steps: int) -> Timed:
        before, meter = pacer.overruns, Meter()
        for _ in range(steps):
            pacer.begin_step(job.batch)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            after_step()
        pacer.end_step()
        return Timed(*meter.read(), pacer.overruns - before, pacer.real_share)

    return segment


def no_communication(job: Job) -> Segment:
    """Every host trains for itself."""
    return loop(job, job.network())


def ddp(job: Job, bucket_cap_mb: float | None = None, hook: Any = None, state: Any = None) -> Segment:
    """Train under torch's DistributedDataParallel."""
    network = job.network()
    model = DistributedDataParallel(network, bucket_cap_mb=bucket_cap_mb)
    if hook is not None:
        model.register_comm_hook(state, hook)
    return loop(job, network, model)


def power_sgd(job: Job, bucket_cap_mb: float | None = None) -> Segment:
    """Train under DDP with torch's PowerSGD hook at rank 4, from the third step on."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    return ddp(job, bucket_cap_mb, powerSGD_hook.powerSGD_hook, state)


def model_averager(job: Job) -> Segment:
    """Average with torch's PeriodicModelAverager."""
    network = job.network()
    averager = PeriodicModelAverager(period=job.period)
    return loop(job, network, after_step=lambda: averager.average_parameters(network.parameters()))


def accelerate_local_sgd(job: Job) -> Segment:
    """Average with LocalSGD of Hugging Face's accelerate."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    network = job.network()
    model, optimizer = accelerator.prepare(network, optimizer_of(network))
    local = LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=job.period)
    if not local.enabled:
        raise RuntimeError(f"accelerate sees no other process: {accelerator.state!r}")
    _enter(job, local)
    return loop(job, network, model, optimizer, local.step)


def torchft_local_sgd(job: Job) -> Segment:
    """Average with torchft's LocalSGD."""
    from torchft.local_sgd import LocalSGD

    network = job.network()
    optimizer = optimizer_of(network)
    _enter(job, LocalSGD(_torchft_manager(job, "local"), network, optimizer, sync_every=job.period))
    return loop(job, network, optimizer=optimizer)


def torchft_diloco(job: Job) -> Segment:
    """Average with torchft's DiLoCo: one fragment, so that all parameters travel once a period, and no delay.

    In buckets, which is not its default but faster: without them every parameter is a message of its own.
    """
    from torchft.local_sgd import DiLoCo

    network = job.network()
    inner = optimizer_of(network)
    outer = torch.optim.SGD(network.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    _enter(job, DiLoCo(_torchft_manager(job, "diloco"), [network], inner, outer, job.period, use_bucketization=True))
    return loop(job, network, optimizer=inner)


def averager_alone(job: Job) -> Segment:
    """Average with our Averager in a plain loop, without Lightning."""
    network = job.network()
    averager = Averager(Recorder(CommLedger()), Averaging().bucket_bytes)
    parameters = list(network.parameters())
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done % job.period == 0:
            with torch.no_grad():
                averager.average_(parameters, "parameters")

    return loop(job, network, after_step=after_step)


class Classifier(pl.LightningModule):
    """The model of the job under Lightning."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


class Stopwatch(pl.Callback):
    """Times the batches behind the first ones, from a barrier to the end of the last."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.meter: Meter | None = None
        self.result = (0.0, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self.meter = Meter()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.meter is not None:
            self.result = self.meter.read()


def lightning(job: Job, strategy: Callable[[], Any], warmup: int, num_nodes: int | None = None) -> Segment:
    """Train under Lightning: each segment is a ``fit`` of its own, which warms up before it is timed."""

    def segment(steps: int) -> Timed:
        stopwatch, device = Stopwatch(warmup), EmulatedDevice(job.step_s, job.batch)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, num_nodes=num_nodes or dist.get_world_size(), strategy=strategy(),
            callbacks=[stopwatch, device], max_steps=warmup + steps, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(
            Classifier(job.network()), DataLoader(TensorDataset(*job.samples(warmup + steps)), batch_size=job.batch)
        )
        assert device.pacer is not None
        return Timed(*stopwatch.result, device.pacer.overruns, device.pacer.real_share)

    return segment


def ours(job: Job) -> Segment:
    """Train under Lightning with our LocalUpdateStrategy."""
    return lightning(job, lambda: LocalUpdateStrategy(FixedPeriod(job.period), timeout=TIMEOUT), warmup=job.period)


def lightning_ddp(job: Job) -> Segment:
    """Train under Lightning's own ``ddp``."""
    return lightning(job, lambda: DDPStrategy(timeout=TIMEOUT), warmup=2)


def lightning_alone(job: Job) -> Segment:
    """Train under Lightning, every host for itself."""
    return lightning(job, lambda: SingleDeviceStrategy(torch.device("cpu")), warmup=2, num_nodes=1)


def _enter(job: Job, context: AbstractContextManager[Any]) -> None:
    context.__enter__()  # for the whole run; leaving it would only average once more


def _torchft_manager(job: Job, name: str) -> Any:
    """Start torchft's manager for this host, and on host 0 a lighthouse for all of them."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    address, hosts = _own_address(), dist.get_world_size()
    lighthouse: list[str] = [""]
    if dist.get_rank() == 0:
        server = LighthouseServer(bind="[::]:0", min_replicas=hosts, join_timeout_ms=10_000, quorum_tick_ms=10)
        job.closing.append(server.shutdown)
        lighthouse = [f"http://{address}:{server.address().rpartition(':')[2]}"]
    dist.broadcast_object_list(lighthouse)
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT), load_state_dict=None, state_dict=None, min_replica_size=hosts,
        use_async_quorum=False, timeout=TIMEOUT, rank=0, world_size=1, store_addr=address, store_port=store.port,
        lighthouse_addr=lighthouse[0], replica_id=f"{name}_{dist.get_rank()}", hostname=address, init_sync=False,
        heartbeat_interval=timedelta(seconds=1),
    )  # fmt: skip
    job.closing += [manager.shutdown, lambda: store]
    return manager


def _own_address() -> str:
    """Return the IPv4 address of this host's interface in the lab."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", interface().encode()[:15]))  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])


@dataclass(frozen=True)
class Tool:
    """A tool of the comparison.

    Args:
        label: As the report names it.
        make: Makes it, on all hosts at once.
        every_step: Whether it communicates in every step; otherwise once a period.
        risky: Whether it may end the process, so that it is tried in processes of its own first.
        communicates: Whether it communicates at all.

    """

    label: str
    make: Callable[[Job], Segment]
    every_step: bool = False
    risky: bool = False
    communicates: bool = True


BEST = "ddp_best_bucket"

TOOLS = {
    LIMIT: Tool("no communication", no_communication, communicates=False),
    "lightning_limit": Tool("no communication, Lightning", lightning_alone, communicates=False),
    PLAIN: Tool("DDP", ddp, every_step=True),
    "lightning_ddp": Tool("DDP, Lightning `ddp`", lightning_ddp, every_step=True),
    "ddp_fp16": Tool(
        "DDP, fp16 hook", lambda job: ddp(job, hook=default_hooks.fp16_compress_hook), every_step=True, risky=True
    ),
    "ddp_bf16": Tool(
        "DDP, bf16 hook", lambda job: ddp(job, hook=default_hooks.bf16_compress_hook), every_step=True, risky=True
    ),
    "ddp_powersgd": Tool("DDP, PowerSGD hook (rank 4)", power_sgd, every_step=True, risky=True),
    "ddp_powersgd_one_bucket": Tool(
        "DDP, PowerSGD hook (rank 4), one bucket", lambda job: power_sgd(job, 1000.0), every_step=True, risky=True
    ),
    "model_averager": Tool("torch PeriodicModelAverager", model_averager),
    "accelerate": Tool("accelerate LocalSGD", accelerate_local_sgd, risky=True),
    "torchft_local": Tool("torchft LocalSGD", torchft_local_sgd, risky=True),
    "torchft_diloco": Tool("torchft DiLoCo, bucketised", torchft_diloco, risky=True),
    "averager": Tool("ours: `Averager` in a plain loop", averager_alone),
    OURS: Tool("ours: `LocalUpdateStrategy`, Lightning", ours),
}
