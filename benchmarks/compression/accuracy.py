"""Accuracy and bytes of every compression on real handwritten digits, over paired seeds.

    python -m benchmarks.compression.accuracy [--seeds 5] [--start-epochs 60] [--epochs 15] [--variants NAME …]

For each seed a dense run is trained first; then every variant, the dense one among them, goes on from that run's
weights over the same images in the same order, with the same schedule of learning rates. Two ranks on this machine,
over gloo. The results, `docs/results/compression_accuracy_<date>.md` and a JSON file beside it, are written again after
each run, and a figure after each seed. With the defaults about 20 minutes on 2 cores.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.compression.accuracy_report import DENSE, draw, sections
from benchmarks.kit.accuracy import accuracy_of
from benchmarks.kit.options import Parser, chosen, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.ranks import BARE, quiet, run_ranks
from benchmarks.kit.results import Results
from benchmarks.kit.steps import left_s
from lightning_comm import (
    Cast,
    CompressedDDPStrategy,
    FixedPeriod,
    Int8,
    LocalUpdateStrategy,
    MagnitudePruning,
    PowerSGD,
    SparseMask,
    Ternary,
    TopK,
)
from lightning_comm.core.ledger import wire_bytes
from lightning_comm.core.quantities import duration
from lightning_comm.examples import DigitsData, TimmClassifier
from lightning_comm.transport.averaging import Averaging

RANKS = 2
PERIOD, OVERLAP_STEPS = 8, 6
BUCKET_MB = 0.1  # of gradients and of parameters: several for a model of 0.8 MB
_MODEL = "vit_tiny_patch16_224"
_MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
_NOT_TRAINING = ("start", "evaluation", "checkpoint")


def _mask(sparsity: float, then: Any = None) -> SparseMask:
    return SparseMask(MagnitudePruning(sparsity=sparsity), then=then)


GRADIENTS: dict[str, tuple[str, str, Any]] = {
    "bf16": ("bf16", "gradients", Cast("bf16")),
    "int8": ("int8", "gradients", Int8()),
    "topk": ("top-k 1 %", "gradients", TopK(0.01)),
    "powersgd": ("PowerSGD, rank 2", "gradients", PowerSGD(2)),
    "ternary": ("ternary", "gradients", Ternary()),
    "mask50": ("mask 50 %", "masks", _mask(0.5)),
    "mask80": ("mask 80 %", "masks", _mask(0.8)),
    "mask90": ("mask 90 %", "masks", _mask(0.9)),
    "mask80_bf16": ("mask 80 %, bf16 (`pactrain`)", "masks", _mask(0.8, Cast("bf16"))),
    "mask80_ternary": ("mask 80 %, ternary", "masks", _mask(0.8, Ternary())),
}
LOCAL: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("in full", {}),
    "local_bf16": ("bf16", {"compression": Cast("bf16")}),
    "local_int8": ("int8", {"compression": Int8()}),
    "local_topk": ("top-k 1 %", {"compression": TopK(0.01)}),
    "local_overlap": ("overlap", {"overlap_steps": OVERLAP_STEPS}),
    "local_bf16_overlap": ("bf16 and overlap", {"compression": Cast("bf16"), "overlap_steps": OVERLAP_STEPS}),
    "local_mask80_bf16": ("mask 80 %, bf16", {"compression": _mask(0.8, Cast("bf16"))}),
}
VARIANTS: dict[str, tuple[str, str]] = {
    DENSE: ("dense", DENSE),
    **{name: (label, family) for name, (label, family, _) in GRADIENTS.items()},
    **{name: (f"local updates, {label}", "local updates") for name, (label, _) in LOCAL.items()},
}


def strategy_of(variant: str) -> Callable[[], Any]:
    """Return what makes a variant's strategy, on every rank."""
    if variant == DENSE:
        return lambda: DDPStrategy(bucket_cap_mb=BUCKET_MB)
    if variant in GRADIENTS:
        return lambda: CompressedDDPStrategy(GRADIENTS[variant][2], bucket_cap_mb=BUCKET_MB)
    settings = LOCAL[variant][1]
    return lambda: LocalUpdateStrategy(FixedPeriod(PERIOD), averaging=Averaging(bucket_mib=BUCKET_MB, **settings))


def usable(names: list[str]) -> tuple[list[str], list[str]]:
    """Return those that can run, and why others cannot."""
    fields = {each.name for each in dataclasses.fields(Averaging)}
    missing = {name: sorted(set(settings) - fields) for name, (_, settings) in LOCAL.items()}
    left_out = [
        f"{VARIANTS[name][0]}: left out, since `Averaging` has no `{fields_[0]}`"
        for name, fields_ in missing.items()
        if fields_ and name in names
    ]
    return [name for name in names if not missing.get(name)], left_out


def train(rank: int, variant: str, seed: int, start: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank, from the weights in ``start`` if there are any; without them, write them there at the end."""
    quiet()
    goes_on = Path(start).exists()
    epochs, lr = (options["epochs"], options["lr"]) if goes_on else (options["start_epochs"], options["start_lr"])
    seed_everything(seed + 1000 * goes_on, verbose=False)
    data = DigitsData(batch_size=options["batch"], seed=seed + 1000 * goes_on)
    steps = epochs * (len(data.train_dataloader()) // RANKS)  # outside a Trainer the loader is that of one rank
    model = TimmClassifier(
        _MODEL, num_classes=10, model_args=_MODEL_ARGS, lr=lr, weight_decay=0.05, warmup_steps=steps // 10
    )
    if goes_on:
        model.load_state_dict(torch.load(start, weights_only=True))
    strategy = strategy_of(variant)()
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", devices=RANKS, max_epochs=epochs, limit_val_batches=0, **BARE
    )
    trainer.fit(model, data)
    if not goes_on and rank == 0:
        torch.save(model.state_dict(), start)
    parameters = [parameter.detach() for parameter in model.parameters()]
    return {
        "accuracy": accuracy_of(model, data.val_dataloader()),
        "steps": trainer.global_step,
        "sent_bytes": _sent_bytes(strategy, trainer.global_step, sum(each.numel() for each in parameters)),
        "zero_share": sum(int((each == 0).sum()) for each in parameters) / sum(each.numel() for each in parameters),
        "weight_sum": sum(float(each.double().sum()) for each in parameters),
    }


def _sent_bytes(strategy: Any, steps: int, parameters: int) -> int:
    """Return what a rank sent for training: from the ledger, or, for plain DDP, by the formula of an all-reduce."""
    if not hasattr(strategy, "ledger"):
        return steps * wire_bytes("all_reduce", 4 * parameters, RANKS)
    ledger = strategy.ledger
    return int(sum(ledger.wire_bytes(name) for name in ledger.purposes if name not in _NOT_TRAINING))


def run(variant: str, seed: int, start: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train a variant at a seed and return what it reached; ranks must end with the same weights."""
    began = time.monotonic()
    answers = run_ranks(train, RANKS, variant, seed, start, options)
    sums = [each.pop("weight_sum") for each in answers]
    if len(set(sums)) > 1:
        raise RuntimeError(f"{variant}, seed {seed}: ranks ended with different weights, of sums {sums}")
    return {"variant": variant, "seed": seed, **answers[0], "wall_s": time.monotonic() - began}


_INTRODUCTION = """A {model} of 64 channels and 4 blocks on scikit-learn's handwritten digits, 1,437 to train on and 360
held out; {ranks} ranks, gloo, {batch} images a batch and rank. For each seed a dense run of {start_epochs} epochs
(AdamW, peak learning rate {start_lr}, warm-up over a tenth of it, then cosine to 0) makes the weights that every
variant starts from; the dense one goes on from there as well. All go on for {epochs} epochs with the peak at {lr}, the
same schedule and the same images in the same order. Buckets are of {bucket} MB. Masks prune by magnitude when training
goes on. Local updates synchronise every {period} steps.

*accuracy*: on the held-out images after the last step, its mean and standard deviation over seeds. *against dense*: the
mean over seeds of the difference to the dense run of the same seed, with its 95 % interval by Student's t. *sent per
rank*: what training sends, from the ledger, counted as a ring all-reduce sends it; for dense by the same formula. The
weights that all ranks are given at the start are left out."""


def _introduction(report: Report) -> str:
    return _INTRODUCTION.format(**report["settings"], ranks=RANKS, model=_MODEL, period=PERIOD, bucket=BUCKET_MB)


PAGE = Page("compression_accuracy", "Compressions on real digits", _introduction, sections, conditions_last=True)


def main() -> None:
    """Run all seeds and variants and write the results files."""
    given = options()
    names, left_out = usable(given.variants)
    print("\n".join(left_out))
    settings = settings_of(given, "batch", "start_epochs", "epochs", "start_lr", "lr")
    variants = {name: VARIANTS[name] for name in names}
    results = Results(
        PAGE, given.out, settings=settings, left_out=left_out, start_accuracies=[], runs=[], variants=variants
    )
    figure, report = results.path.with_suffix(".png"), results.report
    report["figure"] = figure.name
    began, total = time.monotonic(), given.seeds * (len(names) + 1)
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            start = str(Path(folder) / "start.pt")
            report["start_accuracies"].append(run(DENSE, seed, start, settings)["accuracy"])
            print(f"seed {seed}: the dense start reached {100 * report['start_accuracies'][-1]:.2f} %", flush=True)
            for name in names:
                found = run(name, seed, start, settings)
                report["runs"].append(found)
                done = len(report["runs"]) + len(report["start_accuracies"])
                reached = f"{100 * found['accuracy']:.2f} %, {found['sent_bytes'] / 1e6:.2f} MB"
                left = duration(left_s(began, done, total))
                print(
                    f"seed {seed}: {VARIANTS[name][0]}: {reached}, {found['wall_s']:.1f} s; about {left} left",
                    flush=True,
                )
                results.write()
        draw(report, figure)
    results.tell()
    print(figure)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.numbers(seeds=5, start_epochs=60, epochs=15, start_lr=0.002, lr=0.0005)
    parser.number("--batch", 32, "images of a batch on each rank")
    parser.some("--variants", VARIANTS)
    parser.results(PAGE)
    given = parser.parse_args(arguments)
    given.variants = chosen(given.variants, VARIANTS, always=[DENSE])
    return given


if __name__ == "__main__":
    main()
