"""What it costs in a step of Cyclic Data Parallelism to notice that somebody else has changed the weights.

    python -m benchmarks.cyclic.contents [--model vit_tiny_patch16_224] [--batches 8 32] [--repeats 7]

One process computes steps of a small vision transformer; after each, what a rank does once a step is done for all
blocks: the contents are compared with what was noted of them, and noted anew. Seconds are those of the
computing thread.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import timm
import torch
from torch import nn

from benchmarks.kit.options import Parser
from benchmarks.kit.statistics import paired
from benchmarks.kit.tables import Column, ends, terminal
from lightning_comm.ondevice.content import Contents


def stages_of(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """Return the parameters block by block; what lies outside of blocks is a stage of its own."""
    stages: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        stages.setdefault(parts[1] if parts[0] == "blocks" else "", {})[name] = parameter
    return list(stages.values())


def measure(model: nn.Module, image: int, batch: int, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of steps, and of the checks that belong to them."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    stages = stages_of(model)
    contents = Contents(stages)
    steps, checks = [], []
    for _ in range(repeats + 1):
        began = time.thread_time()
        output = model(torch.randn(batch, 3, image, image))
        nn.functional.cross_entropy(output, torch.zeros(batch, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.thread_time()
        for stage in range(len(stages)):
            contents.note(stage)
        for stage in range(len(stages)):
            contents.compare(stage)
        checks.append(time.thread_time() - stepped)
        steps.append(stepped - began)
        assert contents.changed() == []
    return steps[1:], checks[1:]


class Found(NamedTuple):
    """What was measured at a batch size: seconds of steps, and of the checks that belong to them."""

    batch: int
    steps: list[float]
    checks: list[float]

    @property
    def shares(self) -> list[float]:
        """What each check took, in per cent of its step."""
        return [100 * share for share in paired(self.checks, self.steps)]


COLUMNS = [
    Column("images", lambda found: str(found.batch)),
    Column("step", lambda found: f"{1e3 * statistics.median(found.steps):.0f} ms"),
    Column("check", lambda found: f"{1e3 * statistics.median(found.checks):.1f} ms"),
    Column("share", lambda found: f"{statistics.median(found.shares):.2f} %"),
    Column("lowest to highest", lambda found: ends(found.shares, form=".2f")),
]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.number("--image", 64)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.number("--repeats", 7)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print a table."""
    given = options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(given.model, img_size=given.image, patch_size=8, num_classes=10)
    sizes = [parameter.numel() for parameter in model.parameters()]
    print(f"{given.model}, {sum(sizes):,} entries in {len(sizes)} parameters, {given.repeats} repeats")
    found = [Found(batch, *measure(model, given.image, batch, given.repeats)) for batch in given.batches]
    print(terminal(COLUMNS, found))


if __name__ == "__main__":
    main()
