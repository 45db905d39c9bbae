"""What PowerSGD computes for a gradient beside torch's hook: one bucket, one process, nothing sent.

    python benchmarks/power_sgd.py [--rank 2] [--repeats 15] [--json FILE]

Both take the gradient of a small vision transformer, laid out as DDP lays it into its bucket, with error feedback, from
the bases of the step before; in turn, in an order that changes from repeat to repeat. Seconds are those of the
processor, so that another process beside this one hardly shows. What it is in a whole step, with a network:
`compression_steps.py --methods torch_powersgd powersgd_one`.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated_steps import Job
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from lightning_comm import PowerSGD
from lightning_comm.core.ledger import CommLedger
from lightning_comm.reports.pieces import text_table
from lightning_comm.transport.compression.base import Context, Layout, Slot, run_alone
from lightning_comm.transport.recording import Recorder

_WARM_UP = 3


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

    return {"PowerSGD": ours, "torch `powerSGD_hook`": torchs}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = layout_of(options.model, options.image)
    measured = methods(layout, options.rank)
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    gradient = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    for repeat in range(options.repeats + _WARM_UP):
        for name in sorted(measured, reverse=repeat % 2 == 1):
            values = gradient.clone()
            began = time.process_time()
            measured[name](values)
            seconds[name].append(time.process_time() - began)
    dist.destroy_process_group()
    seconds = {name: each[_WARM_UP:] for name, each in seconds.items()}
    torchs = seconds["torch `powerSGD_hook`"]
    print(f"{options.model}, {layout.numel:,} entries in one bucket, rank {options.rank}, {options.repeats} repeats")
    rows = []
    for name, each in seconds.items():
        ratios = [other / own for own, other in zip(each, torchs, strict=True)]  # paired by repeat
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(each):.1f} ms",
                f"{1e3 * min(each):.1f} to {1e3 * max(each):.1f}",
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    print(text_table(["method", "median", "lowest to highest, ms", "times as fast as torch's", "quartiles"], rows))
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
