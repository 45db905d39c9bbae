"""What becomes of runs, and of their checkpoints, when ranks, links, loaders, disks or files are hurt.

    python benchmarks/faults.py [--seeds 0-149] [--jobs 2] [--out faults.jsonl] [--page FILE.md]

Each seed is one run: a kind of fault, a strategy, two or three ranks, and a place in the run, drawn from it. The run
is a small real training with checkpoints; afterwards the newest checkpoints are resumed, and a run that must repeat bit
for bit is compared with one that nothing happened to. A run with ``--out`` that was broken off goes on where it
stopped. The exit status is 1 if a run hangs, loses a checkpoint, blames the wrong rank or does something else that is
in a bad class.

Some 25 minutes on a quiet machine with two processors. Kinds that need emulated hosts or a disk of a few kilobytes
need root, or a kernel that lets users make namespaces.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from faults_judge import judge
from faults_plan import COMPARISON, Case, draw
from faults_report import failures, line, page, terminal
from faults_run import carry_out
from faults_workshop import Workshop

from lightning_comm.lab.cluster import unavailable


def judged(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Return the record of a case with its class."""
    record = carry_out(case, workshop)
    judgement = judge(record)
    return {**record, "class": judgement.word, "why": judgement.why}


def run_all(
    cases: list[Case], workshop: Workshop, jobs: int, on_record: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Carry cases out, some at a time; those on emulated hosts one after the other."""
    waiting, turn, records = deque(cases), threading.Lock(), []

    def next_case() -> Case | None:
        with turn:
            for case in waiting:
                if not case.spec.in_lab or not workshop.lab_turn.locked():
                    waiting.remove(case)
                    return case
            return waiting.popleft() if waiting else None

    def work() -> None:
        while (case := next_case()) is not None:
            record = judged(case, workshop)
            with turn:
                records.append(record)
                on_record(record)

    with ThreadPoolExecutor(jobs) as pool:
        for worker in [pool.submit(work) for _ in range(jobs)]:
            worker.result()  # raises what went wrong in there
    return records


def numbers(text: str) -> list[int]:
    """Return the numbers in a list such as ``0-9,12``."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def environment() -> str:
    """Return what the outcomes depend on, in a line."""
    import lightning
    import torch

    return (
        f"torch {torch.__version__}, lightning {lightning.__version__}; Python {platform.python_version()}, "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} processors; gloo, 1 thread a process."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=numbers, default=numbers("0-149"), help="such as 0-149 or 3,7 (default: 0-149)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--kind", help="this kind of fault for every seed")
    parser.add_argument("--strategy", help=f"this strategy for every seed; {COMPARISON!r} is shown and not judged")
    parser.add_argument("--ranks", type=int, help="this number of ranks for every seed")
    parser.add_argument("--timeout", type=float, default=6.0, help="that of the process group, in seconds")
    parser.add_argument("--slack", type=float, default=1.0, help="multiplies the driver's limits, on a busy machine")
    parser.add_argument("--out", type=Path, help="append records here, and skip the seeds that it has")
    parser.add_argument("--page", type=Path, help="write the tables here, in Markdown")
    parser.add_argument("--keep", type=Path, help="keep logs and files of runs that did not go well here")
    return parser.parse_args()


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.out is None or not options.out.exists():
        return []
    records = [json.loads(text) for text in options.out.read_text().splitlines()]
    return [{**record, **_judged_again(record)} for record in records if record["case"]["seed"] in options.seeds]


def _judged_again(record: dict[str, Any]) -> dict[str, str]:
    judgement = judge(record)
    return {"class": judgement.word, "why": judgement.why}


def main() -> None:
    """Carry out the cases, print a line for each and tables at the end."""
    options = _arguments()
    earlier = _earlier(options)
    done = {(each["case"]["seed"], each["case"]["kind"], each["case"]["strategy"]) for each in earlier}
    cases = [draw(seed, options.kind, options.strategy, options.ranks) for seed in options.seeds]
    cases = [case for case in cases if (case.seed, case.kind, case.strategy) not in done]
    missing = unavailable() if any(case.spec.in_lab for case in cases) else None
    if missing is not None:
        print(f"No emulated hosts, so no links are cut: {missing}.")
        cases = [case for case in cases if not case.spec.in_lab]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    workshop = Workshop(folder, timeout_s=options.timeout, slack=options.slack)

    def on_record(record: dict[str, Any]) -> None:
        print(line(record), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(record, default=str) + "\n")
        if options.keep is not None and record["class"] not in ("ok", "refused clearly"):
            kept = options.keep / Path(record["folder"]).name
            shutil.rmtree(kept, ignore_errors=True)
            sockets = shutil.ignore_patterns("pymp-*", "listener-*")
            shutil.copytree(record["folder"], kept, symlinks=True, ignore=sockets)
        shutil.rmtree(record["folder"], ignore_errors=True)

    try:
        records = earlier + run_all(cases, workshop, options.jobs, on_record)
    finally:
        workshop.close()
        shutil.rmtree(folder, ignore_errors=True)
    records.sort(key=lambda record: record["case"]["seed"])
    print("\n" + environment() + "\n\n" + terminal(records))
    if options.page is not None:
        options.page.write_text(page(records, environment(), shlex.join(["python", *sys.argv]), f"{date.today()}"))
    sys.exit(1 if failures(records) else 0)


if __name__ == "__main__":
    main()
