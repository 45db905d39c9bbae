"""The tools that are compared: each trains the same model on the same batches, and synchronises in its own way.

A tool is made on all hosts at once and gives a `Segment`, a function that takes so many optimizer steps and says how
long they took. All use the process group of the host's process; torchft makes groups of its own in it.
"""

import fcntl
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from benchmarks.kit.step_times import DDP, LIMIT
from benchmarks.kit.trainer import lightning
from benchmarks.kit.training import (
    TIMEOUT,
    Job,
    Segment,
    accelerate_local_sgd,
    ddp,
    interface,
    loop,
    no_communication,
    optimizer_of,
)
from benchmarks.tools.report import OURS
from lightning_comm import FixedPeriod, LocalUpdateStrategy
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averaging, FullAverage
from lightning_comm.transport.recording import Recorder


@dataclass(frozen=True)
class Tool:
    """A method of the comparison.

    Args:
        label: As the report names it.
        make: Makes it, on all hosts at once.
        every_step: Whether it communicates in every step; otherwise once a period.
        risky: Whether it may end the process, so that it is tried in processes of its own first.
        communicates: Whether it communicates at all.
        warms_up: Whether it warms up in each segment, as what runs under Lightning does.

    """

    label: str
    make: Callable[[Job], Segment]
    every_step: bool = False
    risky: bool = False
    communicates: bool = True
    warms_up: bool = False


def power_sgd(job: Job, bucket_cap_mb: float | None = None) -> Segment:
    """Train under DDP with torch's PowerSGD hook at rank 4, from the third step on."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    return ddp(job, bucket_cap_mb, powerSGD_hook.powerSGD_hook, state)


def model_averager(job: Job) -> Segment:
    """Average with torch's PeriodicModelAverager."""
    network = job.network()
    averager = PeriodicModelAverager(period=job.period)
    return loop(job, network, after_step=lambda: averager.average_parameters(network.parameters()))


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
    """Average with our `FullAverage` in a plain loop, without Lightning."""
    network = job.network()
    averager = FullAverage(Recorder(CommLedger()), Averaging().bucket_bytes_under("gloo"))
    parameters = dict(network.named_parameters())
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done % job.period == 0:
            with torch.no_grad():
                averager.average_(parameters)

    return loop(job, network, after_step=after_step)


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


BEST = "ddp_best_bucket"

TOOLS = {
    LIMIT: Tool("no communication", no_communication, communicates=False),
    "lightning_limit": Tool("no communication, Lightning", lightning_alone, communicates=False, warms_up=True),
    DDP: Tool("DDP", ddp, every_step=True),
    "lightning_ddp": Tool("DDP, Lightning `ddp`", lightning_ddp, every_step=True, warms_up=True),
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
    "averager": Tool("ours: `FullAverage` in a plain loop", averager_alone),
    OURS: Tool("ours: `LocalUpdateStrategy`, Lightning", ours, warms_up=True),
}
