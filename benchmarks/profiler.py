"""What `CommProfiler` costs: K processes with it against K processes without, interleaved, in steps of some 50 ms.

    python benchmarks/profiler.py [--ranks 2] [--steps 60] [--repeats 7] [--sleep-ms 40]

A step sleeps for a fixed time in place of a large model's compute, then trains a small model of 200 tensors for real,
and its gradients are really sent. Nothing of the profiler can hide behind the sleep, since its length is fixed. The
same process group runs one fit with and one without the profiler, again and again, in alternating order.

Two figures for each strategy. The first is the difference of the times of a step, paired by repeat; it holds all costs,
and the noise of the machine: a third fit in each repeat, again without the profiler, shows how large that is. The
second is counted inside: the processor time that the profiler's own code took, as a share of a step of 50 ms. It hardly
depends on what else the machine does.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_comm import CommProfiler, FixedPeriod, LocalUpdateStrategy

sys.path.insert(0, str(Path(__file__).parent))
from local_update import run_ranks

_WARMUP, _STEP_S = 10, 0.050
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(timeout=timedelta(minutes=5)),
    "local_sgd": lambda: LocalUpdateStrategy(FixedPeriod(8), timeout=timedelta(minutes=5)),
}


class Sleeper(pl.LightningModule):
    """Some 200 small tensors, with buffers, and a sleep; notes when each step begins."""

    def __init__(self, sleep_s: float) -> None:
        super().__init__()
        layers = [part for _ in range(50) for part in (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))
        self.sleep_s = sleep_s
        self.began: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.began.append(time.perf_counter())
        time.sleep(self.sleep_s)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


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
        accelerator="cpu", devices=ranks, strategy=STRATEGIES[name](), max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, callbacks=[] if profiler is None else [profiler],
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
        for repeat in range(repeats):
            order = ["without", "with", "again without"]
            for turn in order[repeat % 3 :] + order[: repeat % 3]:
                profiler = CountedProfiler(folder) if turn == "with" else None
                result = one_fit(name, profiler, sleep_s, steps, ranks)
                found[turn].append(result["step_s"])
                if profiler is not None:
                    found["inside"].append(result["inside"])
    return found


def show(name: str, rows: list[dict[str, list[float]]]) -> None:
    """Print one strategy's line: medians of the step, of the paired differences, and of the share counted inside."""
    without, with_it, again = (
        [statistics.mean(values) for values in zip(*(row[turn] for row in rows), strict=True)]
        for turn in ("without", "with", "again without")
    )
    pairs = [(w / ((a + b) / 2) - 1) for w, a, b in zip(with_it, without, again, strict=True)]
    noise = [a / b - 1 for a, b in zip(again, without, strict=True)]
    inside = [share for row in rows for share in row["inside"]]
    print(
        f"| {name} | {1e3 * statistics.median(without):.2f} ms | {1e3 * statistics.median(with_it):.2f} ms "
        f"| {_spread(pairs)} | {_spread(noise)} | {_spread(inside)} |"
    )


def _spread(shares: list[float]) -> str:
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{100 * middle:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sleep-ms", type=float, default=40.0)
    options = parser.parse_args()
    for quiet in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, lightning {pl.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, {options.ranks} ranks on loopback (gloo), 1 thread each; {options.repeats} "
        f"repeats of {options.steps} steps, of which {options.sleep_ms:g} ms are a sleep; medians and quartiles\n"
    )
    print("| strategy | step without | step with | difference, in pairs | noise | counted inside, of 50 ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in STRATEGIES:
        arguments = name, options.sleep_ms / 1e3, options.steps, options.repeats, options.ranks
        show(name, run_ranks(compare, options.ranks, *arguments))


if __name__ == "__main__":
    main()
