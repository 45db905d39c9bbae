"""Accuracy of balanced runs against even ones on real handwritten digits, over paired seeds.

    python -m benchmarks.adaptive_partition.accuracy [--seeds 5] [--epochs 20] [--variants NAME …] [--out FILE]

Each variant is a model. For each seed it is trained with even shares, with shares that the callback moves, and on one
process with the whole batch, on the same images in the same order. The first of two ranks is an emulated device of a
third of the other's speed, so shares really move. Without BatchNorm and dropout the three should be the same run up to
rounding, which the third shows the size of. The results, `docs/results/adaptive_partition_accuracy_<date>.md` and a
JSON file beside it, are written again after each seed. With the defaults about 10 minutes on 2 cores.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.kit.accuracy import INTERVAL, MEAN, POINTS, Arm, accuracy_of, against, arm_of, every_seed, labels_of
from benchmarks.kit.options import Parser, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.ranks import BARE, quiet, run_ranks
from benchmarks.kit.results import Results
from benchmarks.kit.steps import left_s
from benchmarks.kit.tables import Column, listed, table
from lightning_comm import AdaptivePartition, PartitionedLoader
from lightning_comm.core.quantities import duration
from lightning_comm.examples import DigitsData, TimmClassifier

EVEN, BALANCED = "even", "balanced"
RANKS, TOTAL, WINDOW = 2, 64, 10
PER_SAMPLE_S = (0.0009, 0.0003)  # slept by rank, beside the compute
_VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
_RESNET = {"in_chans": 1, "channels": [8, 16, 32, 64]}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "vit": ("ViT, float32", "vit_tiny_patch16_224", _VIT, "32-true"),
    "vit64": ("ViT, float64", "vit_tiny_patch16_224", _VIT, "64-true"),
    "resnet": ("ResNet with BatchNorm, float32", "resnet10t", _RESNET, "32-true"),
}
ARMS = {EVEN: RANKS, BALANCED: RANKS, "one process": 1}


class Slow(Callback):
    """Sleeps before each backward in proportion to the samples, and notes this rank's part of the batch's loss."""

    def __init__(self, per_sample_s: float, partition: AdaptivePartition | None) -> None:
        self._per_sample_s, self._partition = per_sample_s, partition
        self._samples = 0
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._samples = len(batch[0])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        time.sleep(self._samples * self._per_sample_s)
        weight = 1.0 if self._partition is None else self._partition.weight
        self.losses.append(float(loss.detach()) * weight / trainer.world_size)


def train(rank: int, variant: str, arm: str, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """Train on this rank; return what it reached, its weights and its part of the losses."""
    quiet()
    seed_everything(seed, verbose=False)
    _, name, arguments, precision = VARIANTS[variant]
    data = DigitsData(batch_size=TOTAL, seed=seed)
    data.setup()
    loader = PartitionedLoader(data.train_dataloader().dataset, TOTAL, seed=seed)
    model = TimmClassifier(name, 10, arguments, lr=lr, weight_decay=0.05, warmup_steps=epochs * len(loader) // 10)
    with tempfile.TemporaryDirectory() as folder:
        partition = None
        if arm == BALANCED:
            partition = AdaptivePartition(window_steps=WINDOW, folder=folder)
        elif arm == EVEN:
            partition = AdaptivePartition("fixed", shares=[1] * RANKS, folder=folder)
        slow = Slow(PER_SAMPLE_S[rank] if arm == BALANCED else 0.0, partition)
        trainer = Trainer(
            strategy="ddp" if ARMS[arm] > 1 else "auto", accelerator="cpu", devices=ARMS[arm], max_epochs=epochs,
            precision=precision, limit_val_batches=0, **BARE,
            callbacks=[slow, *([partition] if partition else [])],
        )  # fmt: skip
        trainer.fit(model, loader)
    journal = partition.journal.to_dict() if partition is not None and partition.journal is not None else {}
    return {
        "accuracy": accuracy_of(model, data.val_dataloader()),
        "steps": trainer.global_step,
        "losses": slow.losses,
        "weights": torch.cat([each.detach().double().view(-1) for each in model.parameters()]).numpy(),
        "changes": [[each["epoch"], each["batch"], each["sizes"]] for each in journal.get("changes", [])],
    }


def run(variant: str, arm: str, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """Train one arm; return its figures, with the loss of each whole batch. Ranks must end with the same weights."""
    began = time.monotonic()
    answers = run_ranks(train, ARMS[arm], variant, arm, seed, epochs, lr)
    if any((each["weights"] != answers[0]["weights"]).any() for each in answers):
        raise RuntimeError(f"{variant}, {arm}, seed {seed}: ranks ended with different weights")
    losses = [sum(parts) for parts in zip(*(each["losses"] for each in answers), strict=True)]
    return {**answers[0], "losses": losses, "wall_s": time.monotonic() - began}


def pair(variant: str, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """Train all arms at a seed; return accuracies, and how far each came from the even run."""
    found = {arm: run(variant, arm, seed, epochs, lr) for arm in ARMS}
    even = found[EVEN]
    rows = {}
    for arm, own in found.items():
        apart = [abs(a - b) for a, b in zip(own["losses"], even["losses"], strict=True)]
        rows[arm] = {
            "accuracy": own["accuracy"],
            "weights_apart": float(abs(own["weights"] - even["weights"]).max()),
            "losses_apart": max(apart),
            "losses_apart_first": max(apart[:50]),
            "last_loss": own["losses"][-1],
            "steps": own["steps"],
            "wall_s": own["wall_s"],
            "changes": own["changes"],
        }
    largest = float(abs(even["weights"]).max())
    return {"variant": variant, "seed": seed, "largest_weight": largest, "arms": rows}


def runs_of(report: Report, variant: str) -> list[Any]:
    """Return the runs of a model, by seed."""
    return sorted((each for each in report["runs"] if each["variant"] == variant), key=lambda each: int(each["seed"]))


def arms_of(label: str, runs: list[Any]) -> list[Arm]:
    """Return the arms of a model over all seeds."""
    found = {name: {run["seed"]: run["arms"][name] for run in runs} for name in runs[0]["arms"]}
    arms = [arm_of([label, name], own, None if name == EVEN else found[EVEN]) for name, own in found.items()]
    return [arm for arm in arms if arm is not None]


def _worst(title: str, name: str) -> Column:
    def cell(arm: Arm) -> str:
        return f"{max(run[name] for run in arm.runs.values()):.1e}" if arm.differences else ""

    return Column(title, cell)


def _moves(arm: Arm) -> str:
    """Return how often shares moved, seed by seed."""
    moves = [str(max(0, len(run["changes"]) - 1)) for run in arm.runs.values()]
    return ", ".join(moves) if arm.labels[1] == BALANCED else ""


COLUMNS = [
    *labels_of("model", "run"),
    MEAN,
    against("even"),
    INTERVAL,
    _worst("weights apart", "weights_apart"),
    _worst("losses apart, first 50", "losses_apart_first"),
    _worst("losses apart", "losses_apart"),
    Column("moves", _moves),
]


def sections(report: Report) -> Iterable[str]:
    """Yield the tables, and what is to be said of them."""
    arms, plans = [], []
    for name, label in report["labels"].items():
        if not (runs := runs_of(report, name)):
            continue
        arms += arms_of(label, runs)
        last = ", ".join("{} + {}".format(*run["arms"][BALANCED]["changes"][-1][2]) for run in runs)
        largest = max(run["largest_weight"] for run in runs)
        plans.append(
            f"{label}: shares at the end {last}; the largest weight is {largest:.2g}; "
            f"{runs[0]['arms'][EVEN]['steps']} steps."
        )
    yield table(COLUMNS, arms)
    yield f"Apart: the worst of the seeds. {POINTS}"
    yield listed(plans)
    yield from every_seed(arms, "model", "run")


_INTRODUCTION = """Small timm models on scikit-learn's handwritten digits, 1,437 to train on and 360 held out, by
`PartitionedLoader`: {total} images a step, {epochs} epochs, AdamW with a peak learning rate of {lr}, warm-up over a
tenth of the run, then cosine to 0. {ranks} ranks over gloo. *even*: 32 images each. *balanced*: rank 0 sleeps 0.9 ms
and rank 1 0.3 ms an image beside the real compute, and the callback, with windows of {window} steps, moves shares by
what it measures. *one process*: the whole batch without other ranks; without BatchNorm it shows what rounding alone
does, and with it what normalising over all images of a step changes. The three are paired by seed: the same weights at
the start, the same images in each step.

*accuracy*: on the held-out images. *weights apart*: the largest difference of any final weight to the even run of the
same seed. *losses apart*: the largest difference of the loss of a whole batch to that of the same step of the even run,
in the first 50 steps and in the whole run; each is the mean over its samples, whoever had them. Training makes
rounding errors grow, so what shares change is to be seen beside what *one process* changes, and in float64."""


def _introduction(report: Report) -> str:
    return _INTRODUCTION.format(ranks=RANKS, total=TOTAL, window=WINDOW, **report["settings"])


PAGE = Page("adaptive_partition_accuracy", "Shares that move, on real digits", _introduction, sections)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.numbers(seeds=5, epochs=20, lr=0.002)
    parser.some("--variants", VARIANTS)
    parser.results(PAGE)
    return parser.parse_args(arguments)


def main() -> None:
    """Run all variants and seeds and write the results files; what is in them already is not run again."""
    given = options()
    settings = settings_of(given, "epochs", "lr")
    labels = {name: VARIANTS[name][0] for name in given.variants}
    results = Results(PAGE, given.out, settings=settings, runs=[], labels=labels)
    if (before := results.earlier()).get("settings") == settings:
        results.report["runs"] = before["runs"]
    done = {(each["variant"], each["seed"]) for each in results.report["runs"]}
    todo = [(name, seed) for seed in range(given.seeds) for name in given.variants if (name, seed) not in done]
    began = time.monotonic()
    for number, (name, seed) in enumerate(todo, 1):
        found = pair(name, seed, **settings)
        results.report["runs"].append(found)
        arms = ", ".join(f"{arm} {100 * each['accuracy']:.2f} %" for arm, each in found["arms"].items())
        print(f"{name}, seed {seed}: {arms}; about {duration(left_s(began, number, len(todo)))} left", flush=True)
        results.write()
    results.tell()


if __name__ == "__main__":
    main()
