"""What PowerSGD computes for a gradient beside torch's hook: one bucket, one process, nothing sent.

    python -m benchmarks.compression.power_sgd [--rank 2] [--repeats 15] [--json FILE]

Both take the gradient of a small vision transformer, laid out as DDP lays it into its bucket, with error feedback, from
the bases of the step before; in turn, in an order that changes from repeat to repeat. Seconds are those of the
processor, so that another process beside this one hardly shows. What it is in a whole step, with a network:
`python -m benchmarks.compression.steps --methods torch_powersgd powersgd_one`.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from benchmarks.kit.options import Parser
from benchmarks.kit.statistics import paired, quartiles
from benchmarks.kit.steps import seconds_of
from benchmarks.kit.tables import Column, ends, terminal
from benchmarks.kit.training import Job
from lightning_comm import PowerSGD
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.compression.base import Context, Layout, Slot, run_alone
from lightning_comm.transport.recording import Recorder

_WARM_UP = 3
_TORCHS = "torch `powerSGD_hook`"


class OneBucket:
    """What torch's hook asks of a bucket that holds the whole gradient."""

    def __init__(self, values: Tensor, layout: Layout) -> None:
        self._values, self._layout = values, layout

    def buffer(self) -> Tensor:
        """Return all entries as one row."""
        return self._values

    def gradients(self) -> list[Tensor]:
        """Return them by parameter."""
        rows = zip(self._layout.slots, self._layout.split(self._values), strict=True)
        return [row.view(slot.shape) for slot, row in rows]

    def index(self) -> int:
        """Return its number."""
        return 0

    def is_last(self) -> bool:
        """Return whether no other follows."""
        return True


def layout_of(model: str, image: int) -> Layout:
    """Return how a model's parameters lie in a single bucket: the last ones first."""
    parameters = reversed(list(Job(model, image, 1, 1.0, 1, {"img_size": image}).network().named_parameters()))
    return Layout(tuple(Slot(name, each.numel(), tuple(each.shape)) for name, each in parameters))


def methods(layout: Layout, rank: int) -> dict[str, Callable[[Tensor], Any]]:
    """Return what is measured: each takes a gradient and replaces it by its mean."""
    codec = PowerSGD(rank).codec(Context(Recorder(CommLedger()), "gradients"))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    state.iter = 2

    def ours(values: Tensor) -> None:
        codec.begin_step()
        run_alone(codec.mean(values, layout))
        codec.end_step()

    def torchs(values: Tensor) -> None:
        powerSGD_hook.powerSGD_hook(state, OneBucket(values, layout)).wait()

    return {"PowerSGD": ours, _TORCHS: torchs}


def columns(seconds: dict[str, list[float]]) -> list[Column]:
    """Return columns for the names of methods; ratios are paired by repeat."""

    def ratios(name: str) -> tuple[float, ...]:
        return paired(seconds[_TORCHS], seconds[name])

    return [
        Column("method", str),
        Column("median", lambda name: f"{1e3 * statistics.median(seconds[name]):.1f} ms"),
        Column("lowest to highest, ms", lambda name: ends(seconds[name], 1e3)),
        Column("times as fast as torch's", lambda name: f"{statistics.median(ratios(name)):.2f}"),
        Column("quartiles", lambda name: ends(quartiles(ratios(name)), form=".2f")),
    ]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.numbers(image=32, rank=2, repeats=15)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print a table."""
    given = options()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = layout_of(given.model, given.image)
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    values = gradient.clone()
    arms = {name: partial(method, values) for name, method in methods(layout, given.rank).items()}
    clock, before = time.process_time, partial(values.copy_, gradient)
    seconds = seconds_of(arms, given.repeats, warm_up=_WARM_UP, clock=clock, before=before)
    dist.destroy_process_group()
    print(f"{given.model}, {layout.numel:,} entries in one bucket, rank {given.rank}, {given.repeats} repeats")
    print(terminal(columns(seconds), seconds))
    if given.json:
        given.json.write_text(json.dumps({"settings": vars(given) | {"json": None}, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
