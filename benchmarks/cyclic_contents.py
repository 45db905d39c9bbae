"""What it costs in a step of Cyclic Data Parallelism to notice that somebody else has changed the weights.

    python benchmarks/cyclic_contents.py [--model vit_tiny_patch16_224] [--batches 8 32] [--repeats 7]

One process computes steps of a small vision transformer; after each, what a rank does once a step is done for all
blocks: the contents are compared with what was noted of them, and noted anew. Seconds are those of the
computing thread.
"""

import argparse
import statistics
import time

import timm
import torch
from torch import nn

from lightning_comm.ondevice.content import Contents
from lightning_comm.reports.pieces import text_table


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


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.image, patch_size=8, num_classes=10)
    sizes = [parameter.numel() for parameter in model.parameters()]
    print(f"{options.model}, {sum(sizes):,} entries in {len(sizes)} parameters, {options.repeats} repeats")
    rows = []
    for batch in options.batches:
        steps, checks = measure(model, options.image, batch, options.repeats)
        shares = sorted(100 * check / step for step, check in zip(steps, checks, strict=True))
        rows.append(
            [
                str(batch),
                f"{1e3 * statistics.median(steps):.0f} ms",
                f"{1e3 * statistics.median(checks):.1f} ms",
                f"{statistics.median(shares):.2f} %",
                f"{shares[0]:.2f} to {shares[-1]:.2f}",
            ]
        )
    print(text_table(["images", "step", "check", "share", "lowest to highest"], rows))


if __name__ == "__main__":
    main()
