"""What each emulated host of `tools.py` runs: every tool in this process, in turn, and again for each repeat.

    python benchmarks/tools_host.py '{"model": "vit_tiny_patch16_224", …}'

Host 0 prints `AT name` when a tool begins, `PROGRESS text` when there is news, and `RESULT {json}` when the sweep and
each repeat are done.
"""

import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from tools_methods import BEST, TIMEOUT, TOOLS, Job, Segment, Timed, Tool, ddp
from tools_report import OURS, PLAIN

_SEGMENT_S = 2.0  # what tools that communicate in every step are to be timed for, at least 2 steps and at most 4
_TRIAL_STEP_S = 0.02  # so that a trial has many steps in little time
_BUCKETS_MB = (0.5, 1.0, 2.5, 8.0, 25.0)  # the last is DDP's own default


def main() -> None:
    """Run a trial of one tool, or the comparison."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every quorum otherwise
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job = Job(*(options[name] for name in ("model", "image", "batch", "step_s", "period")))
    dist.init_process_group("gloo", timeout=TIMEOUT)
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
    steps_s = sweep_buckets(job)
    best = min(steps_s, key=lambda cap: steps_s[cap])
    tools: dict[str, Tool] = {}
    for name in names:
        tools[name] = TOOLS[name]
        if name == PLAIN:
            tools[BEST] = Tool(f"DDP, best `bucket_cap_mb` ({best:g})", lambda job: ddp(job, best), every_step=True)
    every = max(2, min(4, round(_SEGMENT_S / steps_s[_BUCKETS_MB[-1]])))
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
        order = list(tools)
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            say("AT", name)
            steps = every if tools[name].every_step else 2 * job.period if tools[name].communicates else job.period
            measured[name] = together(segments[name](steps), steps)
            say("PROGRESS", f"repeat {repeat + 1} of {repeats}: {tools[name].label}: {measured[name]['step_s']:.3f} s")
        labels = {name: tool.label for name, tool in tools.items()}
        say("RESULT", json.dumps({"repeat": repeat, "bare_s": bare_s, "tools": measured, "labels": labels}))


def sweep_buckets(job: Job) -> dict[float, float]:
    """Return DDP's step time in seconds for each bucket size; the same on all hosts."""
    found = {}
    for cap in _BUCKETS_MB:
        segment = ddp(job, cap)
        segment(2)  # DDP builds its buckets anew after the first step
        steps = 1 if max(found.values(), default=0.0) > _SEGMENT_S / 2 else 2
        found[cap] = together(segment(steps), steps)["step_s"]
        say("PROGRESS", f"DDP with bucket_cap_mb={cap:g}: {found[cap]:.3f} s")
        del segment
        gc.collect()
    return found


def bare_all_reduce(payload_bytes: int) -> float:
    """Return the seconds of one all-reduce of the model's bytes in one piece."""
    flat = torch.full((payload_bytes // 4,), 1e-3)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(flat)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, time.perf_counter() - started)
    return max(gathered)


def together(own: Timed, steps: int) -> dict[str, float]:
    """Return a segment as all hosts saw it: the slowest one's time, and means or sums of the rest."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, asdict(own))
    return {
        "step_s": max(each["seconds"] for each in gathered) / steps,
        "sent_bytes": statistics.fmean(each["sent_bytes"] for each in gathered) / steps,
        "overruns": sum(each["overruns"] for each in gathered),
        "real_share": statistics.fmean(each["real_share"] for each in gathered),
        "steps": steps,
    }


def say(kind: str, text: str) -> None:
    """Print a line for `tools.py`, on host 0."""
    if dist.get_rank() == 0:
        print(f"{kind} {text}", flush=True)


if __name__ == "__main__":
    main()
    # threads of other tools may outlive the interpreter and abort a run that went well
    sys.stdout.flush()
    os._exit(0)
