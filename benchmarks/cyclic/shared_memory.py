"""The sum of activations of several processes that share one machine's memory, under DDP and staggered in time.

    python -m benchmarks.cyclic.shared_memory [--models vit resnet] [--steps 8] [--repeats 3] [--out FILE]

Four ranks on this machine, over gloo, with emulated devices. Each has an `ActivationMeter` that adds into one
`SharedCounter`, so the sum is measured and not computed. Beside it stands what a profile of one rank alone predicts.
The results, `docs/results/cyclic_shared_memory_<date>.md` and a JSON file beside it, are written again after each
repeat. With the defaults about 8 minutes on 2 cores.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cyclic.shared_memory_report import DDP, NONE, STEP, STEP_V1, sections
from benchmarks.kit.options import Parser, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.ranks import BARE, quiet, run_ranks
from benchmarks.kit.results import Results
from benchmarks.kit.steps import rotated
from benchmarks.kit.trainer import Classifier
from benchmarks.kit.training import CLASSES, Job
from lightning_comm import CyclicStrategy
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.ondevice.activation_meter import ActivationMeter, SharedCounter

WORKERS, IMAGE, BATCH = 4, 32, 4
WARMUP, COOLDOWN = 4, 2  # steps before and after those that are measured
_VIT = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 96, "depth": 12, "num_heads": 3}
_RESNET = {"channels": [16, 32, 64, 128]}
MODELS: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "vit": (
        "vit_tiny_patch16_224",
        _VIT,
        ["network.patch_embed", *(f"network.blocks.{block}" for block in range(1, 12))],
    ),
    "resnet": ("resnet26", _RESNET, None),
}


class Metered(pl.Callback):
    """Measures activations during a fit; rank 0 reads the peak of the sum from the start of each batch to the next.

    Args:
        path: Of the sum that the ranks share.
        steps: How many batches are measured.

    """

    def __init__(self, path: str, steps: int) -> None:
        self._path, self._steps = path, steps
        self._meter: ActivationMeter | None = None
        self._counter: SharedCounter | None = None
        self.began_s: list[float] = []
        self.peaks_bytes: list[int] = []
        self.timeline: list[tuple[float, int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counter = SharedCounter(self._path)
        self._meter = ActivationMeter(pl_module, shared=self._counter, timeline=True)
        self._meter.__enter__()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self._counter is not None
        if WARMUP <= batch_idx <= WARMUP + self._steps:
            self.began_s.append(time.monotonic())
            if trainer.global_rank == 0:
                if batch_idx > WARMUP:
                    self.peaks_bytes.append(self._counter.peak)
                self._counter.reset_peak()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._meter is not None
        self._meter.__exit__(None, None, None)
        self.timeline = self._meter.timeline or []

    def profiles(self) -> list[dict[str, Any]]:
        """Return each measured step of this rank alone."""
        found = []
        for began_s, ended_s in zip(self.began_s, self.began_s[1:], strict=False):
            changes = [[at_s - began_s, size] for at_s, size in self.timeline if began_s <= at_s < ended_s]
            found.append({"began_s": 0.0, "length_s": ended_s - began_s, "profile": changes})
        return found


def strategy_of(name: str, model: str) -> Any:
    """Make the strategy of an arm."""
    if name == DDP:
        return DDPStrategy()
    stagger: Any = "none" if name == NONE else "step"
    return CyclicStrategy(rule="v1" if name == STEP_V1 else "v2", stages=MODELS[model][2], stagger=stagger)


def fit(rank: int, model: str, name: str, path: str, steps: int, step_s: float) -> dict[str, Any]:
    """Train on this rank; return the peaks that it saw, or, alone, its profile."""
    quiet()
    torch.set_num_threads(1)
    metered = Metered(path, steps)
    total = WARMUP + steps + COOLDOWN
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(BATCH * total, 3, IMAGE, IMAGE, generator=generator)
    data = TensorDataset(images, torch.randint(0, CLASSES, (BATCH * total,), generator=generator))
    device = EmulatedDevice(step_s, BATCH)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1 if name == "alone" else WORKERS,
        strategy="auto" if name == "alone" else strategy_of(name, model), callbacks=[device, metered], max_steps=total,
        use_distributed_sampler=False, **BARE,
    )  # fmt: skip
    network = Job(MODELS[model][0], IMAGE, BATCH, step_s, 1, MODELS[model][1]).network()
    trainer.fit(Classifier(network), DataLoader(data, batch_size=BATCH))
    assert device.pacer is not None
    span_s = metered.began_s[-1] - metered.began_s[0]
    found = {"step_s": span_s / steps, "overruns": device.pacer.overruns, "real_share": device.pacer.real_share}
    if name == "alone":
        return {**found, "profiles": metered.profiles()}
    return {**found, "peaks_bytes": metered.peaks_bytes}


def run(model: str, name: str, steps: int, step_s: float) -> list[dict[str, Any]]:
    """Run an arm; return what each rank found."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        ranks = 1 if name == "alone" else WORKERS
        return run_ranks(fit, ranks, model, name, str(Path(folder) / "bytes"), steps, step_s)


_INTRODUCTION = """{workers} ranks on one machine over gloo, {batch} samples of {image} x {image} each, SGD with
momentum, with emulated devices that take {step_ms:g} ms for forward and backward. In each rank an `ActivationMeter`
counts the bytes that autograd keeps, and adds them into one `SharedCounter`: what is shown is the peak of that sum as
measured, from the start of each of rank 0's steps to the next. *Peak of the sum*: the median over steps and repeats;
behind it the range over repeats. *Of DDP's*: paired by repeat. *Predicted*: from the profile of one rank that trains
alone with the same device: {workers} copies of it, each shifted by 1/{workers} of a step, against {workers} at once.
The medians over its steps.

Ranks on separate devices do not gain this: there each device has its own peak, which is that of DDP."""


def _introduction(report: Report) -> str:
    step_ms = 1e3 * report["settings"]["step_s"]
    return _INTRODUCTION.format(workers=WORKERS, batch=BATCH, image=IMAGE, step_ms=step_ms)


PAGE = Page("cyclic_shared_memory", "Activations of ranks that share a memory", _introduction, sections)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.some("--models", MODELS)
    parser.number("--steps", 8)
    parser.number("--step-s", 0.6, "seconds of forward and backward")
    parser.number("--repeats", 3)
    parser.results(PAGE)
    return parser.parse_args(arguments)


def main() -> None:
    """Run all models and arms and write the results files."""
    given = options()
    settings = {"workers": WORKERS, **settings_of(given, "steps", "step_s")}
    results = Results(PAGE, given.out, configurations=[], settings=settings)
    for model in given.models:
        (alone,) = run(model, "alone", given.steps, given.step_s)
        found: dict[str, Any] = {"title": MODELS[model][0], "profiles": alone["profiles"], "repeats": []}
        results.report["configurations"].append(found)
        for repeat in range(given.repeats):
            own: dict[str, Any] = {}
            found["repeats"].append({"repeat": repeat, "arms": own})
            for name in rotated([DDP, NONE, STEP, STEP_V1], repeat):
                ranks = run(model, name, given.steps, given.step_s)
                own[name] = {**ranks[0], "step_s": max(each["step_s"] for each in ranks)}
                own[name]["overruns"] = sum(each["overruns"] for each in ranks)
                peaks = json.dumps([round(each / 1e6, 2) for each in own[name]["peaks_bytes"]])
                print(f"{model}, repeat {repeat + 1} of {given.repeats}: {name}: {peaks} MB", flush=True)
            results.write()
    results.tell()


if __name__ == "__main__":
    main()
