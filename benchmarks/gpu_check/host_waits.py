"""How often the host waits for a CUDA device: in a synchronisation, a step under each hook, and a cyclic step.

    python -m benchmarks.gpu_check.host_waits [--only WORD] [--where]

Two ranks over gloo train the tensors of a ResNet-50, all 161 with its buffers and an eighth of its width, under
Lightning's Trainer on a GPU that is not there (``tests/support/mock_cuda.py``): real values and messages, and a note of
whatever would make the host wait. Buckets are cut so that there are thirty. Counted is what the package itself asks
for, from the beginning of one batch to that of the next, once a run has warmed up; not what Lightning or a model does.
"""

import argparse
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from support.mock_cuda import mock_cuda
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kit.options import Parser
from benchmarks.kit.ranks import BARE, run_ranks
from benchmarks.kit.tables import Column, cells, terminal
from lightning_comm import (
    AdaptivePartition,
    Averaging,
    Cast,
    CommProfiler,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    MagnitudePruning,
    PartitionedLoader,
    SparseMask,
)

BUCKETS = 30
BLOCKS = [3, 4, 6, 3]  # of a ResNet-50
CYCLIC_MOST = 1  # the notes of a step that is over
OVERLAP_MOST = 3  # the rank status and the buffers' drift where an average departs, its own drift where it lands
PERIOD = 3
SYNCHRONISES, BETWEEN = 5, 4  # batches, by number: the last of the second round, and one within it
STEPS = 7  # so that a batch follows
TIMEOUT = timedelta(seconds=60)


class Case(NamedTuple):
    """A fit whose waits are counted.

    Args:
        strategy: Makes the strategy, for a bucket size in MiB.
        most: How many waits there may be in the batch that is looked at.
        batch: Which batch that is.
        first: The first one, where several are looked at.
        module: Makes the model.
        options: For the Trainer.
        loader: Makes the data.
        p2p: Whether ranks send tensors of the device to one other rank, which NCCL can do and gloo cannot.

    """

    strategy: Callable[[float], Any]
    most: int
    batch: int = SYNCHRONISES
    first: int | None = None
    module: Callable[[], LightningModule] = lambda: Thin()
    options: Callable[[], dict[str, Any]] = dict
    loader: Callable[[], Any] = lambda: _loader()
    p2p: bool = False


class Found(NamedTuple):
    """What was seen in a fit.

    Args:
        waits: What the package itself has asked for in what is looked at, so that training had to wait.
        beside: Those of its own threads meanwhile: lanes of Cyclic, averages in the background.
        in_backward: Those within a backward, in all batches but the first ones.
        hazards: What a stream did without a wait for another one, in all batches but the first ones.

    """

    waits: list[Any]
    beside: list[Any]
    in_backward: list[Any]
    hazards: list[str]


class Thin(LightningModule):
    """A ResNet-50 of an eighth of its width, of which only the parameters train: they are all drawn to zero."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            net = ResNet(Bottleneck, BLOCKS, num_classes=10, channels=(8, 16, 32, 64), stem_width=8)
        self.net = net.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for tensor in self.net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.zero_()
        if frozen:
            for k, parameter in enumerate(self.net.parameters()):
                parameter.requires_grad_(k % 2 == 0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the squares of all parameters that train."""
        rows = [parameter.reshape(-1) for parameter in self.net.parameters() if parameter.requires_grad]
        return batch[0].mean() * torch.cat(rows).square().mean()

    def configure_optimizers(self) -> Any:
        """Return Adam, whose state can be averaged."""
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad])


class Deep(LightningModule):
    """Modules that run one after the other, as Cyclic Data Parallelism wants them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Tanh())))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return how far the output is from 1."""
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class _Counting(Callback):
    """Takes note of the waits from the beginning of each batch to that of the next."""

    def __init__(self, waits: list[Any], hazards: list[str]) -> None:
        self.waits, self.hazards, self.begins, self.missing = waits, hazards, list[int](), list[int]()

    def on_train_batch_start(self, *_: Any) -> None:
        """Note where a batch begins."""
        self.begins.append(len(self.waits))
        self.missing.append(len(self.hazards))

    def on_train_end(self, *_: Any) -> None:
        """Note where the last one ends."""
        self.begins.append(len(self.waits))

    def own(self, first: int, last: int) -> list[Any]:
        """Return the package's own waits of some batches."""
        return [wait for wait in self.waits[self.begins[first] : self.begins[last + 1]] if wait.own]


def cases() -> dict[str, Case]:
    """Return every case by its name."""
    common = {"process_group_backend": "gloo", "timeout": TIMEOUT}

    def local(**settings: Any) -> Callable[[float], Any]:
        averaging = {each: settings.pop(each) for each in ("compression", "overlap_steps") if each in settings}
        return lambda mib: LocalUpdateStrategy(
            FixedPeriod(PERIOD), averaging=Averaging(bucket_mib=mib, **averaging), **settings, **common
        )

    def compressed(compression: Any) -> Callable[[float], Any]:
        return lambda mib: CompressedDDPStrategy(compression, bucket_cap_mb=mib, **common)

    def plain(mib: float) -> Any:
        return DDPStrategy(bucket_cap_mb=mib, **common)

    mask = SparseMask(MagnitudePruning(0.6))
    words = ("bf16", "fp16", "int8", "powersgd", "topk")
    hooks = {f"ddp_{word}": word for word in words}
    hooks |= {"ddp_sparse_mask": mask, "pactrain": SparseMask(mask.pruning, Cast("bf16"))}
    return {
        "synchronisation in full": Case(local(), 2),
        "synchronisation, momenta averaged": Case(local(optimizer_state="average"), 2),
        "synchronisation, half of it frozen": Case(local(), 2, module=lambda: Thin(frozen=True)),
        **{f"synchronisation, {word}": Case(local(compression=word), 2) for word in words},
        "synchronisation, sparse mask": Case(local(compression=mask), 2),
        "round, overlap": Case(local(overlap_steps=2), OVERLAP_MOST, first=SYNCHRONISES - PERIOD + 1),
        "round, overlap and bf16": Case(
            local(overlap_steps=2, compression="bf16"), OVERLAP_MOST, first=SYNCHRONISES - PERIOD + 1
        ),
        "step of local updates": Case(local(), 0, BETWEEN),
        **{f"step under {word}": Case(compressed(each), 1) for word, each in hooks.items()},
        "step of cyclic": Case(lambda mib: CyclicStrategy(**common), CYCLIC_MOST, module=Deep, p2p=True),
        "step of cyclic_v1": Case(lambda mib: CyclicStrategy("v1", **common), CYCLIC_MOST, module=Deep, p2p=True),
        "step with CommProfiler": Case(plain, 1, options=lambda: {"callbacks": [CommProfiler()]}),
        "step with AdaptivePartition": Case(
            plain, 1, options=lambda: {"callbacks": [AdaptivePartition("observe")]}, loader=lambda: _loader(True)
        ),
    }


# one of each kind of case, for where time is short
KINDS = (
    "synchronisation, momenta averaged",
    "synchronisation, half of it frozen",
    "round, overlap and bf16",
    "step under ddp_powersgd",
    "step under pactrain",
    "step of cyclic",
    "step with CommProfiler",
    "step with AdaptivePartition",
)


@contextmanager
def _one_of_two(rank: int) -> Iterator[None]:
    """Let Lightning take this process for one of two hosts with a GPU each."""
    names = {"NODE_RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "host waits"}
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_comm").setLevel(logging.ERROR)
    with warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        os.chdir(folder)  # journals and profiles are written there
        yield


def count(rank: int, names: list[str]) -> dict[str, Found]:
    """Return what was seen in each case, as a rank of two."""
    found = {}
    with _one_of_two(rank):
        for name in names:
            found[name] = _fit(cases()[name])
        with mock_cuda():  # the group belongs to the device
            dist.barrier()
            dist.destroy_process_group()
    return found


def _fit(case: Case) -> Found:
    with mock_cuda(p2p=case.p2p) as device:
        return seen_in(case, device.waits, device.hazards)


def seen_in(case: Case, waits: list[Any], hazards: list[str]) -> Found:
    """Train on the device that is there, and return what was seen.

    Args:
        case: What to train.
        waits: Where each wait is added as it happens.
        hazards: Where each missing wait of a stream is.

    """
    module, counting = case.module(), _Counting(waits, hazards)
    bucket_mib = sum(each.numel() for each in module.parameters()) * 4 / 2**20 / BUCKETS
    options = case.options()
    runner = Trainer(
        accelerator="gpu",
        devices=[0],
        num_nodes=2,
        strategy=case.strategy(bucket_mib),
        callbacks=[counting, *options.pop("callbacks", [])],
        max_steps=STEPS,
        use_distributed_sampler=False,
        **BARE,
        **options,
    )
    runner.fit(module, case.loader())
    looked_at = counting.own(case.batch if case.first is None else case.first, case.batch)
    # backward has a thread of its own on a device, so it is not enough to look at that which trains
    return Found(
        [wait for wait in looked_at if not wait.thread.startswith("lightning_comm")],
        [wait for wait in looked_at if wait.thread.startswith("lightning_comm")],
        [wait for wait in counting.own(BETWEEN - 1, SYNCHRONISES) if wait.in_backward],
        hazards[counting.missing[BETWEEN - 1] :],  # Lightning makes DDP on a stream that nobody waits for
    )


def _loader(partitioned: bool = False) -> Any:
    data = TensorDataset(torch.ones(4 * STEPS, 8))
    return PartitionedLoader(data, 4) if partitioned else DataLoader(data, batch_size=2)


def columns(found: dict[str, Found]) -> list[Column]:
    """Return columns for the names of cases."""
    limits = cases()
    return [
        Column("case", str),
        Column("waits", lambda name: str(len(found[name].waits))),
        Column("at most", lambda name: str(limits[name].most)),
        Column("in other threads", lambda name: str(len(found[name].beside))),
        Column("in backward", lambda name: str(len(found[name].in_backward))),
        Column("missing stream waits", lambda name: str(len(found[name].hazards))),
    ]


def rows_of(found: dict[str, Found]) -> list[list[str]]:
    """Return a line for each case."""
    return cells(columns(found), found)


def places(waits: list[Any]) -> list[str]:
    """Return where the host waits, how often and for what."""
    counted = Counter((wait.where, wait.kind, wait.in_backward) for wait in waits)
    return [
        f"{times:4d} x {where}: {kind}{', in backward' * inside}"
        for (where, kind, inside), times in counted.most_common()
    ]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", help="a word in the name of the cases to run")
    parser.add_argument("--where", action="store_true", help="say where the waits are")
    return parser.parse_args(arguments)


def main() -> None:
    """Count, and print a table."""
    given = options()
    torch.set_num_threads(1)
    found: dict[str, Found] = {}
    for name in cases():
        if given.only in name:
            found |= run_ranks(count, 2, [name])[0]
    print(terminal(columns(found), found))
    for name, each in found.items():
        if given.where and any(each):
            print(f"\n{name}")
            print("\n".join([*places([*each.waits, *each.beside, *each.in_backward]), *sorted(set(each.hazards))[:5]]))


if __name__ == "__main__":
    main()
