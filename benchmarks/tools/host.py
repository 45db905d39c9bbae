"""What each emulated host runs: every tool in this process, in turn, and again in each repeat; or one tool on trial."""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kit.host import SEGMENT_S, close, found, gathered, repeat_all, say, start, sweep_buckets, together
from benchmarks.kit.hosts import entry
from benchmarks.kit.step_times import DDP
from benchmarks.kit.training import Job, Segment, ddp
from benchmarks.tools.methods import BEST, TOOLS, Tool

_TRIAL_STEP_S = 0.02  # so that a trial has many steps in little time
_BUCKETS_MB = (0.5, 1.0, 2.5, 8.0, 25.0)  # the last is DDP's own default


def on_host(options: dict[str, Any]) -> None:
    """Run a trial of one tool, or the comparison."""
    start()
    names = ("model", "image", "batch", "step_s", "period", "model_args")
    job = Job(*(options[name] for name in names))
    if options["trial"]:
        TOOLS[options["trial"]].make(replace(job, step_s=_TRIAL_STEP_S))(5 * job.period)
    else:
        compare(job, options["tools"], options["repeats"])
    for end in job.closing:
        end()
    close()


def compare(job: Job, names: list[str], repeats: int) -> None:
    """Measure all tools, interleaved."""
    payload_bytes = sum(parameter.numel() * parameter.element_size() for parameter in job.network().parameters())
    steps_s = sweep_buckets(job, _BUCKETS_MB)
    best = min(steps_s, key=lambda cap: steps_s[cap])
    tools: dict[str, Tool] = {}
    for name in names:
        tools[name] = TOOLS[name]
        if name == DDP:
            tools[BEST] = Tool(f"DDP, best `bucket_cap_mb` ({best:g})", lambda job: ddp(job, best), every_step=True)
    labels = {name: tool.label for name, tool in tools.items()}
    every = max(2, min(4, round(SEGMENT_S / steps_s[_BUCKETS_MB[-1]])))
    found(payload_bytes=payload_bytes, bucket_sweep_s=steps_s, steps=every, labels=labels)
    segments: dict[str, Segment] = {}
    for name, tool in tools.items():
        say("AT", name)
        say("PROGRESS", f"warming up {tool.label}")
        segments[name] = tool.make(job)
        if not tool.warms_up:
            segments[name](job.period if not tool.every_step else 2)

    def once(name: str) -> dict[str, Any]:
        tool = tools[name]
        steps = every if tool.every_step else 2 * job.period if tool.communicates else job.period
        return together(segments[name](steps), steps)

    repeat_all(labels, repeats, once, first=lambda: {"bare_s": bare_all_reduce(payload_bytes)})


def bare_all_reduce(payload_bytes: int) -> float:
    """Return the seconds of one all-reduce of the model's bytes in one piece."""
    flat = torch.full((payload_bytes // 4,), 1e-3)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(flat)
    return max(gathered(time.perf_counter() - started))


if __name__ == "__main__":
    entry(lambda: None, on_host)
