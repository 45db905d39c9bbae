"""What a process on an emulated host does around the methods that it times: begin, report, compare with the others."""

import gc
import json
import logging
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from emulated_steps import TIMEOUT, Job, Segment, Timed, ddp

SEGMENT_S = 2.0  # what a method that communicates in every step is to be timed for, where that needs no more than steps


def start() -> None:
    """Join the other hosts, with one thread and without warnings."""
    torch.set_num_threads(1)
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every quorum otherwise
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=TIMEOUT)


def rotated(names: list[str], repeat: int) -> list[str]:
    """Return the names in the order of a repeat: one after the other comes first."""
    at = repeat % len(names)
    return names[at:] + names[:at]


def sweep_buckets(job: Job, caps_mb: Sequence[float]) -> dict[float, float]:
    """Return DDP's step time in seconds for each bucket size; the same on all hosts."""
    found = {}
    for cap in caps_mb:
        segment = ddp(job, cap)
        segment(2)  # DDP builds its buckets anew after the first step
        steps = 1 if max(found.values(), default=0.0) > SEGMENT_S / 2 else 2
        found[cap] = together(segment(steps), steps)["step_s"]
        say("PROGRESS", f"DDP with bucket_cap_mb={cap:g}: {found[cap]:.3f} s")
        del segment
        gc.collect()
    return found


def together(own: Timed, steps: int) -> dict[str, Any]:
    """Return a segment as all hosts saw it: the slowest one's time, and means or sums of the rest."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, asdict(own))
    payloads = [each["payload_bytes"] for each in gathered if each["payload_bytes"] is not None]
    return {
        "step_s": max(each["seconds"] for each in gathered) / steps,
        "sent_bytes": statistics.fmean(each["sent_bytes"] for each in gathered) / steps,
        "overruns": sum(each["overruns"] for each in gathered),
        "real_share": statistics.fmean(each["real_share"] for each in gathered),
        "steps": steps,
        "payload_bytes": statistics.fmean(payloads) / steps if payloads else None,
    }


def say(kind: str, text: str) -> None:
    """Print a line for whoever started the hosts, on host 0."""
    if dist.get_rank() == 0:
        print(f"{kind} {text}", flush=True)


def repeat_all(segments: Mapping[str, Segment], steps: Mapping[str, int], repeats: int) -> None:
    """Measure all methods again and again, interleaved, and tell of each repeat."""
    for repeat in range(repeats):
        measured: dict[str, Any] = {}
        for name in rotated(list(segments), repeat):
            say("AT", name)
            measured[name] = together(segments[name](steps[name]), steps[name])
            say("PROGRESS", f"repeat {repeat + 1} of {repeats}: {name}: {1e3 * measured[name]['step_s']:.0f} ms a step")
        say("RESULT", json.dumps({"repeat": repeat, "tools": measured}))
