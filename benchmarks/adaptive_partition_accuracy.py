"""Accuracy of balanced runs against even ones on real handwritten digits, over paired seeds.

    python benchmarks/adaptive_partition_accuracy.py [--seeds 5] [--epochs 20] [--variants NAME …] [--out FILE]

Each variant is a model. For each seed it is trained with even shares, with shares that the callback moves, and on one
process with the whole batch, on the same images in the same order. The first of two ranks is an emulated device of a
third of the other's speed, so shares really move. Without BatchNorm and dropout the three should be the same run up to
rounding, which the third shows the size of. The results, `docs/results/adaptive_partition_accuracy_<date>.md` and a
JSON file beside it, are written again after each seed. With the defaults about 10 minutes on 2 cores.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from emulated_run import as_report, results_file, write
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from partition_accuracy_report import page
from partition_fits import quiet
from ranks import run_ranks

from lightning_comm import AdaptivePartition, PartitionedLoader
from lightning_comm.core.quantities import duration
from lightning_comm.examples import DigitsData, TimmClassifier

RANKS, TOTAL, WINDOW = 2, 64, 10
PER_SAMPLE_S = (0.0009, 0.0003)  # slept by rank, beside the compute
_VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
_RESNET = {"in_chans": 1, "channels": [8, 16, 32, 64]}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "vit": ("ViT, float32", "vit_tiny_patch16_224", _VIT, "32-true"),
    "vit64": ("ViT, float64", "vit_tiny_patch16_224", _VIT, "64-true"),
    "resnet": ("ResNet with BatchNorm, float32", "resnet10t", _RESNET, "32-true"),
}
ARMS = {"even": RANKS, "balanced": RANKS, "one process": 1}


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
        if arm == "balanced":
            partition = AdaptivePartition(window_steps=WINDOW, folder=folder)
        elif arm == "even":
            partition = AdaptivePartition("fixed", shares=[1] * RANKS, folder=folder)
        slow = Slow(PER_SAMPLE_S[rank] if arm == "balanced" else 0.0, partition)
        trainer = Trainer(
            strategy="ddp" if ARMS[arm] > 1 else "auto", accelerator="cpu", devices=ARMS[arm], max_epochs=epochs,
            precision=precision, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[slow, *([partition] if partition else [])],
        )  # fmt: skip
        trainer.fit(model, loader)
    journal = partition.journal.to_dict() if partition is not None and partition.journal is not None else {}
    return {
        "accuracy": _accuracy(model, data),
        "steps": trainer.global_step,
        "losses": slow.losses,
        "weights": torch.cat([each.detach().double().view(-1) for each in model.parameters()]).numpy(),
        "changes": [[each["epoch"], each["batch"], each["sizes"]] for each in journal.get("changes", [])],
    }


@torch.no_grad()
def _accuracy(model: TimmClassifier, data: DigitsData) -> float:
    model.eval()
    dtype = next(model.parameters()).dtype
    right = [(model(images.to(dtype)).argmax(dim=1) == labels) for images, labels in data.val_dataloader()]
    return float(torch.cat(right).double().mean())


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
    even = found["even"]
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


def main() -> None:
    """Run all variants and seeds and write the results files; what is in them already is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument(
        "--out", help="the Markdown file; docs/results/adaptive_partition_accuracy_<date>.md by default"
    )
    options = parser.parse_args()
    settings = {"epochs": options.epochs, "lr": options.lr}
    report = as_report("Shares that move, on real digits")
    report["command"] = shlex.join(["python", "benchmarks/adaptive_partition_accuracy.py", *sys.argv[1:]])
    report |= {"settings": settings, "runs": [], "labels": {name: VARIANTS[name][0] for name in options.variants}}
    del report["configurations"]
    out = Path(options.out) if options.out else results_file("adaptive_partition_accuracy", report)
    if out.with_suffix(".json").exists():
        before = json.loads(out.with_suffix(".json").read_text())
        report["runs"] = before["runs"] if before["settings"] == settings else []
    done = {(each["variant"], each["seed"]) for each in report["runs"]}
    todo = [(name, seed) for seed in range(options.seeds) for name in options.variants if (name, seed) not in done]
    introduction = _INTRODUCTION.format(ranks=RANKS, total=TOTAL, window=WINDOW, **settings)
    began = time.monotonic()
    for number, (name, seed) in enumerate(todo):
        found = pair(name, seed, **settings)
        report["runs"].append(found)
        left_s = (time.monotonic() - began) / (number + 1) * (len(todo) - number - 1)
        arms = ", ".join(f"{arm} {100 * each['accuracy']:.2f} %" for arm, each in found["arms"].items())
        print(f"{name}, seed {seed}: {arms}; about {duration(left_s)} left", flush=True)
        write(report, out, page(report, introduction))
    print(f"\n{out}\n{out.with_suffix('.json')}")


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


if __name__ == "__main__":
    main()
