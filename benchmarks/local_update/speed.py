"""Speed of local updates on this machine: the averages, and what the strategy costs between them.

    python -m benchmarks.local_update.speed [--ranks 2] [--hosts 4 --link 1gbit] [--repeats 15]

Three tables. First, averaging a 22 MB model in place, for several bucket sizes, against one bare `all_reduce` of the
same bytes; the runs are interleaved, and each line gives the median, the quartiles and the ratio of the bare time to
it. Second, the same between emulated hosts on a shaped link. Third, the time of an optimizer step between
synchronisations: K processes with the strategy against K processes that run the same loop without any strategy,
interleaved as well.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kit.environment import environment
from benchmarks.kit.hosts import ask, entry
from benchmarks.kit.options import Parser
from benchmarks.kit.ranks import BARE, quiet, run_ranks
from benchmarks.kit.steps import seconds_of
from lightning_comm import FixedPeriod, LocalUpdateStrategy
from lightning_comm.core.ledger import CommLedger
from lightning_comm.lab.cluster import Lab, unavailable
from lightning_comm.transport.averaging import FullAverage
from lightning_comm.transport.recording import Recorder

BUCKETS_MIB = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def vit_small_shapes() -> list[tuple[int, ...]]:
    """Shapes of a ViT with 5.5 million parameters, 22 MB in float32: large matrices and many small vectors."""
    width, shapes = 192, [(192, 3, 16, 16), (192,), (1, 197, 192), (1, 1, 192)]
    for _ in range(12):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,), (100, width), (100,)]


def time_averages(rank: int, repeats: int) -> dict[str, list[float]]:
    """Time a bare all-reduce and our average at each bucket size, one after the other, again and again."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    tensors = {str(k): torch.randn(shape) for k, shape in enumerate(vit_small_shapes())}
    flat = torch.randn(sum(tensor.numel() for tensor in tensors.values()))
    recorder = Recorder(CommLedger())
    candidates: dict[str, Callable[[], Any]] = {"bare all_reduce": lambda: dist.all_reduce(flat)}
    for mib in BUCKETS_MIB:
        averager = FullAverage(recorder, int(mib * 2**20))
        candidates[f"average_, buckets of {mib:g} MiB"] = lambda each=averager: each.average_(tensors)

    def before() -> None:
        flat.fill_(1e-3)
        dist.barrier()

    return seconds_of(candidates, repeats, warm_up=2, before=before)  # connections and memory


def on_host(repeats: int) -> dict[str, list[float]]:
    """Time averages as one of the emulated hosts."""
    torch.set_num_threads(1)
    times = time_averages(int(os.environ["RANK"]), repeats)
    dist.barrier()
    dist.destroy_process_group()
    return times


def show_averages(times: dict[str, list[float]]) -> None:
    """Print a line for each way to average, with its rate as a share of that of the bare all-reduce."""
    bare = statistics.median(times["bare all_reduce"])
    for name, values in times.items():
        print(line(name, values, 1e3, f"{bare / statistics.median(values):.3f}"))


class Tiny(pl.LightningModule):
    """A model so small that a step is nearly all overhead of the loop."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
        self.steps, self.began, self.seconds = steps, 0.0, 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 100:
            self.began = time.perf_counter()
        if batch_idx == self.steps - 10:
            self.seconds = (time.perf_counter() - self.began) / (batch_idx - 100)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def time_steps(rank: int, ranks: int, with_strategy: bool, steps: int) -> float:
    """Return the seconds of a step, in the middle of one long round."""
    if with_strategy:
        strategy: Any = LocalUpdateStrategy(FixedPeriod(10 * steps))
    else:
        strategy = SingleDeviceStrategy(torch.device("cpu"))
        for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "NODE_RANK"):
            os.environ.pop(name)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks if with_strategy else 1, strategy=strategy, max_steps=steps,
        limit_val_batches=0, use_distributed_sampler=False, **BARE,
    )  # fmt: skip
    model = Tiny(steps)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(steps, 4)), batch_size=1))
    return model.seconds


def line(name: str, values: list[float], unit: float, note: str = "") -> str:
    """Format a median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{name:32} {middle * unit:9.2f}   {low * unit:8.2f} to {high * unit:8.2f}   {note}"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.number("--ranks", 2)
    parser.number("--hosts", 4, "emulated hosts for the second table")
    parser.add_argument("--link", default="1gbit", help="rate of their links")
    parser.numbers(repeats=15, steps=3000)
    return parser.parse_args(arguments)


def main() -> None:
    """Print the three tables."""
    given = options()
    quiet()
    megabytes = 4 * sum(torch.Size(shape).numel() for shape in vit_small_shapes()) / 1e6
    print(f"{environment('cores')} {given.ranks} ranks on loopback (gloo), 1 thread each, {given.repeats} repeats\n")

    times = run_ranks(time_averages, given.ranks, given.repeats)[0]
    print(f"Averaging {megabytes:.1f} MB, milliseconds: median, quartiles, and its rate as a share of the bare one's")
    show_averages(times)
    few = max(5, given.repeats // 3)
    print(f"\nThe same on {given.hosts} emulated hosts with links of {given.link}")
    if (missing := unavailable()) is None:
        with Lab(given.hosts, given.link) as lab:
            show_averages(ask(lab, "local_update.speed", few))
    else:
        print(f"left out: {missing}")

    print("\nOne optimizer step between synchronisations, microseconds: median and quartiles over repeats and ranks")
    steps: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(few):
        for with_strategy in (False, True):
            steps[with_strategy] += run_ranks(time_steps, given.ranks, given.ranks, with_strategy, given.steps)
    print(line(f"{given.ranks} processes without it", steps[False], 1e6))
    print(line(f"{given.ranks} processes with it", steps[True], 1e6))
    print(f"difference of the medians: {(statistics.median(steps[True]) - statistics.median(steps[False])) * 1e6:.1f}")


if __name__ == "__main__":
    entry(main, on_host)
