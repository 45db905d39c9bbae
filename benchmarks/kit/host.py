"""What a process on an emulated host does around the methods that it times: begin, report, compare with the others."""

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from benchmarks.kit.ranks import quiet
from benchmarks.kit.steps import rotated
from benchmarks.kit.training import TIMEOUT, Job, Timed, ddp, optimizer_of, wrapped

SEGMENT_S = 2.0  # what a method that communicates in every step is to be timed for, where that needs no more than steps
FEW_BUCKETS = 10


def start() -> None:
    """Join the other hosts, with one thread and without warnings."""
    torch.set_num_threads(1)
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every quorum otherwise
    quiet()
    dist.init_process_group("gloo", timeout=TIMEOUT)


def close() -> None:
    """End the process of a host: threads of other tools may outlive the interpreter and abort a run that went well."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def say(kind: str, text: str) -> None:
    """Print a line for whoever started the hosts, on host 0."""
    if dist.get_rank() == 0:
        print(f"{kind} {text}", flush=True)


def found(**fields: Any) -> None:
    """Hand a result to whoever started the hosts."""
    say("RESULT", json.dumps(fields))


def gathered(own: Any) -> list[Any]:
    """Return what each host has, on all of them."""
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, own)
    return each


def together(own: Timed, steps: int) -> dict[str, Any]:
    """Return a segment as all hosts saw it: the slowest one's time, and means or sums of the rest."""
    hosts = gathered(asdict(own))
    payloads = [each["payload_bytes"] for each in hosts if each["payload_bytes"] is not None]
    return {
        "step_s": max(each["seconds"] for each in hosts) / steps,
        "sent_bytes": statistics.fmean(each["sent_bytes"] for each in hosts) / steps,
        "overruns": sum(each["overruns"] for each in hosts),
        "real_share": statistics.fmean(each["real_share"] for each in hosts),
        "steps": steps,
        "payload_bytes": statistics.fmean(payloads) / steps if payloads else None,
    }


def repeat_all(
    labels: Mapping[str, str],
    repeats: int,
    once: Callable[[str], dict[str, Any]],
    first: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Measure all methods again and again, interleaved, and tell of each repeat.

    Args:
        labels: Names of methods, and what they are called.
        repeats: How often.
        once: Measures a method, together with the other hosts.
        first: What is measured at the beginning of each repeat.

    """
    for repeat in range(repeats):
        beside = first()
        measured: dict[str, Any] = {}
        for name in rotated(list(labels), repeat):
            say("AT", name)
            measured[name] = once(name)
            took = f"{labels[name]}: {1e3 * measured[name]['step_s']:.0f} ms a step"
            say("PROGRESS", f"repeat {repeat + 1} of {repeats}: {took}")
        found(repeat=repeat, tools=measured, **beside)


def sweep_buckets(job: Job, caps_mb: Sequence[float]) -> dict[float, float]:
    """Return DDP's step time in seconds for each bucket size; the same on all hosts."""
    swept: dict[float, float] = {}
    for cap in caps_mb:
        segment = ddp(job, cap)
        segment(2)  # DDP builds its buckets anew after the first step
        steps = 1 if max(swept.values(), default=0.0) > SEGMENT_S / 2 else 2
        swept[cap] = together(segment(steps), steps)["step_s"]
        say("PROGRESS", f"DDP with bucket_cap_mb={cap:g}: {swept[cap]:.3f} s")
        del segment
        gc.collect()
    return swept


def count_buckets(job: Job, cap_mb: float) -> int:
    """Return into how many buckets DDP cuts the model, once it has seen a backward."""
    network = job.network()
    model = wrapped(network, cap_mb)
    seen: list[int] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)
    images, labels = job.samples(1)
    optimizer = optimizer_of(network)
    for _ in range(2):
        seen.clear()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
    return len(seen)


def best_buckets(job: Job, caps_mb: Sequence[float], word: str) -> dict[str, Any]:
    """Return DDP's best bucket size, how it was found, and a note on it that begins its end with a word."""
    swept_s = sweep_buckets(job, caps_mb)
    best = min(swept_s, key=lambda cap: swept_s[cap])
    counts = {cap: count_buckets(job, cap) for cap in swept_s}
    sweep = ", ".join(f"{cap:g} MB: {1e3 * swept_s[cap]:.0f} ms ({counts[cap]})" for cap in swept_s)
    few = "" if counts[best] >= FEW_BUCKETS else f" That is less than {FEW_BUCKETS}."
    note = f"DDP by `bucket_cap_mb` (and its buckets): {sweep}. {word} {best:g} MB, {counts[best]} buckets.{few}"
    return {"best_mb": best, "buckets": counts, "bucket_sweep_s": swept_s, "note": note}
