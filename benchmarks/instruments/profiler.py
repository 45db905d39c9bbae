"""What `CommProfiler` costs: K processes with it against K processes without, interleaved, in steps of some 50 ms.

    python -m benchmarks.instruments.profiler [--ranks 2] [--steps 60] [--repeats 7] [--sleep-ms 40]

A step sleeps for a fixed time in place of a large model's compute, then trains a small model of 200 tensors for real,
and its gradients are really sent. Nothing of the profiler can hide behind the sleep, since its length is fixed. The
same process group runs one fit with and one without the profiler, again and again, in alternating order.

Two figures for each strategy. The first is the difference of the times of a step, paired by repeat; it holds all costs,
and the noise of the machine: a third fit in each repeat, again without the profiler, shows how large that is. The
second is counted inside: the processor time that the profiler's own code took, as a share of a step of 50 ms. It hardly
depends on what else the machine does.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kit.environment import environment
from benchmarks.kit.options import Parser
from benchmarks.kit.ranks import BARE, quiet, run_ranks
from benchmarks.kit.statistics import quartiles
from benchmarks.kit.steps import interleaved
from benchmarks.kit.tables import Column, ends, table
from benchmarks.kit.trainer import Sleeper
from lightning_comm import CommProfiler, FixedPeriod, LocalUpdateStrategy

_WARMUP, _STEP_S = 10, 0.050
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(timeout=timedelta(minutes=5)),
    "local_sgd": lambda: LocalUpdateStrategy(FixedPeriod(8), timeout=timedelta(minutes=5)),
}


class CountedProfiler(CommProfiler):
    """Adds up the processor time that its own code takes within training."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, page=False)
        self.inside_s = 0.0
        self._depth = 0

    def _safely(self, body: Callable[[], None]) -> None:
        self._depth += 1
        began = time.thread_time()
        super()._safely(body)
        self._depth -= 1
        if self._depth == 0:
            self.inside_s += time.thread_time() - began

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == _WARMUP:
            self.inside_s = 0.0
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        self.until_now_s = self.inside_s


def one_fit(name: str, profiler: CountedProfiler | None, sleep_s: float, steps: int, ranks: int) -> dict[str, float]:
    """Return the mean time of a step after the warm-up, and the profiler's own share of one of 50 ms."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=STRATEGIES[name](), max_steps=steps,
        limit_val_batches=0, use_distributed_sampler=False, **BARE, callbacks=[] if profiler is None else [profiler],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Sleeper(sleep_s)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(8 * steps, 64)), batch_size=8))
    seconds = model.began[-1] - model.began[_WARMUP]
    counted = len(model.began) - 1 - _WARMUP
    inside_s = 0.0 if profiler is None else profiler.until_now_s
    return {"step_s": seconds / counted, "inside": inside_s / counted / _STEP_S}


def compare(rank: int, name: str, sleep_s: float, steps: int, repeats: int, ranks: int) -> dict[str, list[float]]:
    """Run fits without, with and again without the profiler, each repeat in another order."""
    found: dict[str, list[float]] = {"without": [], "with": [], "again without": [], "inside": []}
    with tempfile.TemporaryDirectory() as folder:
        for _, turn in interleaved(["without", "with", "again without"], repeats):
            profiler = CountedProfiler(folder) if turn == "with" else None
            result = one_fit(name, profiler, sleep_s, steps, ranks)
            found[turn].append(result["step_s"])
            if profiler is not None:
                found["inside"].append(result["inside"])
    return found


def figures_of(name: str, ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Return one strategy's times, means over ranks, and shares of a step: differences in pairs, noise, inside."""
    without, with_it, again = (
        [statistics.mean(values) for values in zip(*(own[turn] for own in ranks), strict=True)]
        for turn in ("without", "with", "again without")
    )
    return {
        "name": name,
        "without": without,
        "with": with_it,
        "pairs": [w / ((a + b) / 2) - 1 for w, a, b in zip(with_it, without, again, strict=True)],
        "noise": [a / b - 1 for a, b in zip(again, without, strict=True)],
        "inside": [share for own in ranks for share in own["inside"]],
    }


def _spread(shares: list[float]) -> str:
    return f"{100 * statistics.median(shares):.2f} % ({ends(quartiles(shares), 100, '.2f')})"


COLUMNS = [
    Column("strategy", lambda found: found["name"]),
    Column("step without", lambda found: f"{1e3 * statistics.median(found['without']):.2f} ms"),
    Column("step with", lambda found: f"{1e3 * statistics.median(found['with']):.2f} ms"),
    Column("difference, in pairs", lambda found: _spread(found["pairs"])),
    Column("noise", lambda found: _spread(found["noise"])),
    Column("counted inside, of 50 ms", lambda found: _spread(found["inside"])),
]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.numbers(ranks=2, steps=60, repeats=7, sleep_ms=40.0)
    return parser.parse_args(arguments)


def main() -> None:
    """Print the table."""
    given = options()
    quiet()
    print(
        f"{environment('cores')} {given.ranks} ranks on loopback (gloo), 1 thread each; {given.repeats} repeats of "
        f"{given.steps} steps, of which {given.sleep_ms:g} ms are a sleep; medians and quartiles\n",
        flush=True,
    )
    arguments = given.sleep_ms / 1e3, given.steps, given.repeats, given.ranks
    found = [figures_of(name, run_ranks(compare, given.ranks, name, *arguments)) for name in STRATEGIES]
    print(table(COLUMNS, found))


if __name__ == "__main__":
    main()
