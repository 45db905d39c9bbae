"""What becomes of runs, and of their checkpoints, when ranks, links, loaders, disks or files are hurt.

    python -m benchmarks.faults [--seeds 0-149] [--jobs 2] [--out faults.jsonl] [--page FILE.md]

Each seed is one run: a kind of fault, a strategy, two or three ranks, and a place in the run, drawn from it. The run
is a small real training with checkpoints; afterwards the newest checkpoints are resumed, and a run that must repeat bit
for bit is compared with one that nothing happened to. A run with ``--out`` that was broken off goes on where it
stopped. The exit status is 1 if a run hangs, loses a checkpoint, blames the wrong rank or does something else that is
in a bad class.

Some 25 minutes on a quiet machine with two processors. Kinds that need emulated hosts or a disk of a few kilobytes
need root, or a kernel that lets users make namespaces.
"""

import argparse
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

from benchmarks.faults.judge import judge
from benchmarks.faults.plan import COMPARISON, Case, draw
from benchmarks.faults.report import failures, line, page_of, terminal
from benchmarks.faults.run import carry_out
from benchmarks.faults.workshop import Workshop
from benchmarks.kit.environment import environment
from benchmarks.kit.options import Parser, command, numbers
from benchmarks.kit.results import append, records
from lightning_comm.lab.cluster import unavailable


def judged(case: Case, workshop: Workshop) -> dict[str, Any]:
    """Return the record of a case with its class."""
    return _classed(carry_out(case, workshop))


def _classed(record: dict[str, Any]) -> dict[str, Any]:
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


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
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
    return parser.parse_args(arguments)


def _earlier(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the records that are there already, judged again."""
    found = [] if given.out is None else records(given.out)
    return [_classed(record) for record in found if record["case"]["seed"] in given.seeds]


def main() -> None:
    """Carry out the cases, print a line for each and tables at the end."""
    given = options()
    earlier = _earlier(given)
    done = {(each["case"]["seed"], each["case"]["kind"], each["case"]["strategy"]) for each in earlier}
    cases = [draw(seed, given.kind, given.strategy, given.ranks) for seed in given.seeds]
    cases = [case for case in cases if (case.seed, case.kind, case.strategy) not in done]
    missing = unavailable() if any(case.spec.in_lab for case in cases) else None
    if missing is not None:
        print(f"No emulated hosts, so no links are cut: {missing}.")
        cases = [case for case in cases if not case.spec.in_lab]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    workshop = Workshop(folder, timeout_s=given.timeout, slack=given.slack)

    def on_record(record: dict[str, Any]) -> None:
        print(line(record), flush=True)
        if given.out is not None:
            append(given.out, record)
        if given.keep is not None and record["class"] not in ("ok", "refused clearly"):
            kept = given.keep / Path(record["folder"]).name
            shutil.rmtree(kept, ignore_errors=True)
            sockets = shutil.ignore_patterns("pymp-*", "listener-*")
            shutil.copytree(record["folder"], kept, symlinks=True, ignore=sockets)
        shutil.rmtree(record["folder"], ignore_errors=True)

    try:
        found = earlier + run_all(cases, workshop, given.jobs, on_record)
    finally:
        workshop.close()
        shutil.rmtree(folder, ignore_errors=True)
    found.sort(key=lambda record: record["case"]["seed"])
    conditions = {"date": f"{date.today()}", "environment": environment("cores; gloo, 1 thread a process")}
    print(f"\n{conditions['environment']}\n\n{terminal(found)}")
    if given.page is not None:
        given.page.write_text(page_of(found, {**conditions, "command": command()}))
    sys.exit(1 if failures(found) else 0)


if __name__ == "__main__":
    main()
