"""What each emulated host of `tools.py` runs: every tool in this process, in turn, and again for each repeat.

    python benchmarks/tools_host.py '{"model": "vit_tiny_patch16_224", …}'

Host 0 prints `AT name` when a tool begins, `PROGRESS text` when there is news, and `RESULT {json}` when the sweep and
each repeat are done.
"""

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from emulated_host import SEGMENT_S, rotated, say, start, sweep_buckets, together
from emulated_steps import Job, Segment, Tool, ddp
from tools_methods import BEST, TOOLS
from tools_report import OURS, PLAIN

_TRIAL_STEP_S = 0.02  # so that a trial has many steps in little time
_BUCKETS_MB = (0.5, 1.0, 2.5, 8.0, 25.0)  # the last is DDP's own default


def main() -> None:
    """Run a trial of one tool, or the comparison."""
    options = json.loads(sys.argv[1])
    start()
    names = ("model", "image", "batch", "step_s", "period", "model_args")
    job = Job(*(options[name] for name in names))
    if options["trial"]:
        TOOLS[options["trial"]].make(replace(job, step_s=_TRIAL_STEP_S))(5 * job.period)
    else:
        compare(job, options["tools"], options["repeats"])
    for close in job.closing:
        close()
    dist.barrier()
    dist.destroy_process_group()


def compare(job: Job, names: list[str], repeats: int) -> None:
    """Measure all tools, interleaved."""
    payload_bytes = sum(parameter.numel() * parameter.element_size() for parameter in job.network().parameters())
    steps_s = sweep_buckets(job, _BUCKETS_MB)
    best = min(steps_s, key=lambda cap: steps_s[cap])
    tools: dict[str, Tool] = {}
    for name in names:
        tools[name] = TOOLS[name]
        if name == PLAIN:
            tools[BEST] = Tool(f"DDP, best `bucket_cap_mb` ({best:g})", lambda job: ddp(job, best), every_step=True)
    every = max(2, min(4, round(SEGMENT_S / steps_s[_BUCKETS_MB[-1]])))
    say("RESULT", json.dumps({"payload_bytes": payload_bytes, "bucket_sweep_s": steps_s, "steps": every}))
    segments: dict[str, Segment] = {}
    for name, tool in tools.items():
        say("AT", name)
        say("PROGRESS", f"warming up {tool.label}")
        segments[name] = tool.make(job)
        if name not in (OURS, "lightning_ddp", "lightning_limit"):  # these warm up in each segment
            segments[name](job.period if not tool.every_step else 2)
    for repeat in range(repeats):
        bare_s = bare_all_reduce(payload_bytes)
        measured: dict[str, Any] = {}
        for name in rotated(list(tools), repeat):
            say("AT", name)
            steps = every if tools[name].every_step else 2 * job.period if tools[name].communicates else job.period
            measured[name] = together(segments[name](steps), steps)
            say("PROGRESS", f"repeat {repeat + 1} of {repeats}: {tools[name].label}: {measured[name]['step_s']:.3f} s")
        labels = {name: tool.label for name, tool in tools.items()}
        say("RESULT", json.dumps({"repeat": repeat, "bare_s": bare_s, "tools": measured, "labels": labels}))


def bare_all_reduce(payload_bytes: int) -> float:
    """Return the seconds of one all-reduce of the model's bytes in one piece."""
    flat = torch.full((payload_bytes // 4,), 1e-3)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(flat)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, time.perf_counter() - started)
    return max(gathered)


if __name__ == "__main__":
    main()
    # threads of other tools may outlive the interpreter and abort a run that went well
    sys.stdout.flush()
    os._exit(0)
