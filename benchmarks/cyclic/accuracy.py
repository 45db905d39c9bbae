"""Accuracy of Cyclic Data Parallelism on real handwritten digits, over paired seeds: plain data parallelism, v1, v2.

    python -m benchmarks.cyclic.accuracy [--seeds 5] [--epochs N] [--cases NAME …] [--out FILE]

Each case is a model with an optimizer and a learning rate. For each seed it is trained with every rule on the same
images in the same order, by `simulate_delay`, which gives bit for bit the parameters that the ranks of
`CyclicStrategy` would have. The results, `docs/results/cyclic_accuracy_<date>.md` and a JSON file beside it, are
written again after each run. With the defaults about 10 minutes on 2 cores, with a process on each.
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.kit.accuracy import POINTS, Arm, accuracy_of, against, arm_of, every_seed, labels_of
from benchmarks.kit.options import Parser, chosen, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.results import Results
from benchmarks.kit.steps import left_s
from benchmarks.kit.tables import Column, ends, table
from lightning_comm.core.quantities import duration
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.examples import DigitsData, TimmClassifier
from lightning_comm.ondevice.cyclic import simulate_delay

DP = "dp"
WORKERS, STAGES, BATCH = 4, 12, 16
_VIT_ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 2}
_VIT: tuple[str, dict[str, Any]] = ("vit_tiny_patch16_224", _VIT_ARGS)
_RESNET: tuple[str, dict[str, Any]] = ("resnet10t", {"in_chans": 1, "channels": [8, 16, 32, 64]})


@dataclass(frozen=True)
class Case:
    """A model with an optimizer.

    Args:
        label: Its name for people.
        model: Of timm, with its arguments.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: The peak of the learning rate.
        epochs: How long it trains, where the command line does not say.
        momentum: Of SGD.

    """

    label: str
    model: tuple[str, dict[str, Any]]
    optimizer: str
    lr: float
    epochs: int
    momentum: float = 0.0


CASES = {
    "vit_sgd": Case("ViT, SGD", _VIT, "sgd", 0.2, 24),
    "vit_momentum": Case("ViT, SGD, momentum 0.9", _VIT, "sgd", 0.02, 24, 0.9),
    "vit_adamw": Case("ViT, AdamW", _VIT, "adamw", 0.002, 24),
    "resnet_sgd": Case("ResNet, SGD", _RESNET, "sgd", 0.2, 10),
    "resnet_momentum": Case("ResNet, SGD, momentum 0.9", _RESNET, "sgd", 0.02, 10, 0.9),
    "vit_momentum_high": Case("ViT, SGD, momentum 0.9, high rate", _VIT, "sgd", 0.05, 24, 0.9),
    "resnet_momentum_high": Case("ResNet, SGD, momentum 0.9, high rate", _RESNET, "sgd", 0.2, 10, 0.9),
}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    DP: ("plain data parallelism", {"warmup_sync_steps": 10**9}),
    "v1": ("v1", {"rule": "v1"}),
    "v2": ("v2", {"rule": "v2"}),
    "v1_warmup": ("v1, synchronous at first", {"rule": "v1"}),
    "v2_warmup": ("v2, synchronous at first", {"rule": "v2"}),
}


def micro_batches(seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the ranks of a run load, rank after rank in each step."""
    data = DigitsData(batch_size=BATCH, seed=seed)
    data.setup()
    images = data.train_dataloader().dataset
    loaders: list[Any] = [
        ResumableLoader(images, BATCH, seed=seed, drop_last=True, num_replicas=WORKERS, rank=rank)
        for rank in range(WORKERS)
    ]
    for epoch in range(epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for step in zip(*loaders, strict=True):
            yield from step


def train(name: str, rule: str, seed: int, epochs: int | None, sync_share: float) -> dict[str, Any]:
    """Train a case with a rule at a seed; return its accuracy and losses."""
    torch.set_num_threads(1)
    began = time.monotonic()
    case = CASES[name]
    seed_everything(seed, verbose=False)
    batches = list(micro_batches(seed, epochs or case.epochs))
    steps = len(batches) // WORKERS
    model = TimmClassifier(case.model[0], 10, case.model[1], lr=case.lr, warmup_steps=steps // 10)
    optimizer: torch.optim.Optimizer
    if case.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.model.parameters(), lr=case.lr, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.model.parameters(), lr=case.lr, momentum=case.momentum)
    scheduler = LambdaLR(optimizer, lambda step: model.lr_schedule.rate(step, total_steps=steps) / case.lr)
    settings = dict(RULES[rule][1])
    if rule.endswith("warmup"):
        settings["warmup_sync_steps"] = round(sync_share * steps)
    run = simulate_delay(
        model.model, batches, _loss, optimizer, workers=WORKERS, stages=STAGES, scheduler=scheduler, **settings
    )
    losses = run.mean_losses
    return {
        "case": name,
        "rule": rule,
        "seed": seed,
        "accuracy": accuracy_of(model.model, DigitsData(batch_size=360).val_dataloader()),
        "last_loss": _finite(sum(losses[-10:]) / 10),
        "highest_loss": _finite(max(losses)),
        "steps": steps,
        "wall_s": time.monotonic() - began,
    }


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(network(batch[0]), batch[1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no word for it


def arms_of(report: Report) -> Iterator[Arm]:
    """Yield an arm for each case with each rule, over the seeds at which plain data parallelism was run too."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for run in report["runs"]:
        found.setdefault((run["case"], run["rule"]), {})[run["seed"]] = run
    for case, label in report["cases"].items():
        for rule, said in report["rules"].items():
            base = None if rule == DP else found.get((case, DP), {})
            if (arm := arm_of([label, said], found.get((case, rule), {}), base)) is not None:
                yield arm


def _loss(arm: Arm, name: str, of: Any) -> str:
    values: Sequence[float | None] = [run[name] for run in arm.runs.values()]
    return "not finite" if None in values else f"{of(values):.3g}"


COLUMNS = [
    *labels_of("case", "rule"),
    Column("accuracy", lambda arm: f"{100 * statistics.fmean(arm.accuracies):.2f} %"),
    Column("lowest to highest", lambda arm: ends(arm.accuracies, 100, ".2f")),
    against("plain"),
    Column("lowest to highest", lambda arm: ends(arm.differences, 100, "+.2f") if arm.differences else ""),
    Column("last loss", lambda arm: _loss(arm, "last_loss", statistics.fmean)),
    Column("highest loss", lambda arm: _loss(arm, "highest_loss", max)),
]


def sections(report: Report) -> Iterable[str]:
    """Yield the tables, and what is to be said of them."""
    arms = list(arms_of(report))
    seeds = {run["seed"] for run in report["runs"]}
    steps = ", ".join(str(count) for count in sorted({run["steps"] for run in report["runs"]}))
    yield table(COLUMNS, arms)
    yield f"{len(seeds)} seeds, {steps} steps. {POINTS}"
    yield from every_seed(arms, "case", "rule")


_INTRODUCTION = """Small timm models on scikit-learn's handwritten digits, 1,437 to train on and 360 held out. {workers}
workers, {stages} stages, {batch} images a worker and step, {epochs}; the rate rises over a tenth of the run and falls
by a cosine to 0. Trained by `simulate_delay`, which gives the parameters of `CyclicStrategy` bit for bit. All rows of a
case and seed have the same weights at the start and the same images in the same order. *Synchronous at first*:
`warmup_sync_steps` is {sync_share:g} of the run. Rates are ones at which plain data parallelism trains well; a *high
rate* is one at which it still does, to show what delay does beside momentum.

*accuracy*: on the held-out images after the last step, the mean over seeds, with the lowest and the highest. *against
plain*: the mean of the differences to plain data parallelism at the same seed, in points, with the lowest and the
highest. *highest loss*: of any step of any seed, the mean over the workers; *last loss*: of the last 10 steps. The
number behind a case is the peak of its learning rate."""


def _introduction(report: Report) -> str:
    epochs, sync_share = report["settings"]["epochs"], report["settings"]["sync_share"]
    lengths = f"{epochs} epochs" if epochs else "24 epochs of ViT and 10 of ResNet"
    return _INTRODUCTION.format(workers=WORKERS, stages=STAGES, batch=BATCH, sync_share=sync_share, epochs=lengths)


PAGE = Page("cyclic_accuracy", "Cyclic Data Parallelism on real digits", _introduction, sections)


def main() -> None:
    """Run all cases, rules and seeds, two at a time, and write the results files."""
    given = options()
    cases = {name: f"{CASES[name].label}, {CASES[name].lr:g}" for name in given.cases}
    rules = {name: RULES[name][0] for name in given.rules}
    settings = settings_of(given, "epochs", "sync_share")
    results = Results(PAGE, given.out, settings=settings, runs=[], rules=rules, cases=cases)
    todo = [(name, rule, seed) for seed in range(given.seeds) for name in cases for rule in rules]
    began = time.monotonic()
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train, *each, given.epochs, given.sync_share) for each in todo]
        for number, future in enumerate(as_completed(futures), 1):
            found = future.result()
            results.report["runs"].append(found)
            left = duration(left_s(began, number, len(todo)))
            print(
                f"seed {found['seed']}: {cases[found['case']]}: {rules[found['rule']]}: "
                f"{100 * found['accuracy']:.2f} %, {found['wall_s']:.1f} s; about {left} left",
                flush=True,
            )
            results.write()
    results.tell()


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.number("--seeds", 5)
    parser.add_argument("--epochs", type=int, help="24 for ViT and 10 for ResNet by default")
    parser.number("--sync-share", 0.2, "of the rows that are synchronous at first")
    parser.some("--cases", CASES)
    parser.some("--rules", RULES)
    parser.number("--processes", 2)
    parser.results(PAGE)
    given = parser.parse_args(arguments)
    given.rules = chosen(given.rules, RULES, always=[DP])
    return given


if __name__ == "__main__":
    main()
