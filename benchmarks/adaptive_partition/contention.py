"""Real compute on two emulated hosts, one of which is slowed: what a host of the benchmark runs.

Each host has one core to itself. Host 1 has company: a process that stops and continues the rank's process all the
time, or one that competes with it for the core. In each repeat both hosts first compute alone, without messages, at
three sizes of batch: from that come the speeds that theory is asked with, and the optimum.
"""

import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.kit.hosts import entry, program
from benchmarks.kit.steps import rotated

SLOWED = 1
TOTAL = 192
CYCLE_S = 0.002  # how long a rank that is stopped runs, and stands
_ALONE = (24, 96, 168)  # samples
_ALONE_BATCHES = 12
_STEPS = {"even": 40, "balance": 145, "optimum": 40}
_STEADY = {"even": 30, "balance": 60, "optimum": 30}
_MODEL = "vit_tiny_patch16_224"
_MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}


def make_company(kind: str, process: int) -> None:
    """Disturb a process until standard input is closed."""
    while not select.select([sys.stdin], [], [], 0)[0]:
        if kind == "hog":
            until = time.monotonic() + 0.01
            while time.monotonic() < until:
                pass
            continue
        os.kill(process, signal.SIGSTOP)
        time.sleep(CYCLE_S)
        os.kill(process, signal.SIGCONT)
        time.sleep(CYCLE_S)


@contextmanager
def company(kind: str) -> Iterator[None]:
    """Have this process disturbed by another one on its core."""
    command = program("adaptive_partition.contention", "--company", kind, str(os.getpid()))
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        try:
            yield
        finally:
            assert other.stdin is not None
            other.stdin.close()  # it lets this process go on before it ends
            other.wait()


def network() -> Any:
    """Return a model whose compute is much and whose gradients are few: 0.8 MB."""
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(_MODEL, num_classes=10, **_MODEL_ARGS)


def alone(module: Any) -> list[float]:
    """Return what a batch costs on this host: fixed seconds, and those of a sample."""
    import numpy as np
    import torch
    import torch.distributed as dist

    medians = []
    for samples in _ALONE:
        images = torch.randn(samples, 1, 8, 8)
        dist.barrier()
        seconds = []
        for _ in range(_ALONE_BATCHES):
            began = time.perf_counter()
            module(images).square().mean().backward()
            seconds.append(time.perf_counter() - began)
            module.zero_grad()
        medians.append(statistics.median(seconds[2:]))
    per_sample_s, fixed_s = np.polyfit(_ALONE, medians, 1)
    return [max(0.0, float(fixed_s)), float(per_sample_s)]


def one_repeat(order: list[str]) -> dict[str, Any]:
    """Measure both hosts alone, then all arms."""
    import torch

    from benchmarks.adaptive_partition.fits import Arm, Regressor, timed_fit
    from benchmarks.kit.host import gathered
    from lightning_comm.core.adaptive_partition.shares import RankCost, solve_partition

    own = alone(network())
    costs = gathered(own)
    best = solve_partition([RankCost(*cost) for cost in costs], TOTAL, lo=1)
    arms = {
        "even": Arm("fixed", _STEPS["even"], (TOTAL // 2,) * 2),
        "balance": Arm("balance", _STEPS["balance"]),
        "optimum": Arm("fixed", _STEPS["optimum"], best),
    }
    images = torch.randn(TOTAL, 1, 8, 8)
    tools = {name: timed_fit(arms[name], TOTAL, 2, Regressor(network()), samples=images, num_nodes=2) for name in order}
    return {"tools": tools, "costs": costs, "load": os.getloadavg()[0]}


def on_host(options: dict[str, Any]) -> None:
    """Measure on this host, together with the other one."""
    import torch.distributed as dist

    from benchmarks.adaptive_partition.fits import WINDOW
    from benchmarks.kit.host import close, found, say, start

    host = int(os.environ["NODE_RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[host]})
    start()
    found(total=TOTAL, window_steps=WINDOW, change_at=0, steady=_STEADY)
    for repeat in range(options["repeats"]):
        order = rotated(list(_STEPS), repeat)
        with company(options["kind"]) if host == SLOWED else nullcontext():
            measured = one_repeat(order)
            dist.barrier()
        say("PROGRESS", f"{options['kind']}: repeat {repeat + 1} of {options['repeats']}")
        found(repeat=repeat, **measured)
    close()


if __name__ == "__main__":
    if sys.argv[1] == "--company":
        make_company(sys.argv[2], int(sys.argv[3]))
    else:
        entry(lambda: None, on_host)
