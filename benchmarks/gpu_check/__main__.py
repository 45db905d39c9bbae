"""What can be shown on one GPU in eight minutes: correctness, host waits, and what packing, memory and profiling cost.

    python -m benchmarks.gpu_check --out DIR [--minutes 8] [--device cuda|cpu|mock] [--parts 0-3,5]

Each part runs in a process of its own with a limit of its own, and writes a line of JSON into DIR/results.jsonl as soon
as something is found: what was measured, beside what was expected before it was run, and the rule between the two. A
part that breaks, or is too slow, ends alone. What does not fit into the minutes any more is left out, by name. After
each part there is DIR/page.md for docs/results, and in the end a table. A run with --parts adds to what is in DIR: a
part that runs again takes the place of its earlier run.

The exit code is 1 if something fails in the last run of its part, 3 if nothing fails but something is left out, not
measured or proves nothing, and 128 more than the signal that ended the check (143 under `timeout`).

`--device cpu` runs the same with tiny sizes, to see that the script works; what only CUDA can show is said to need it.
`--device mock` runs the lines that are for a GPU, with tiny sizes, on one that is not there; its figures mean nothing.
"""

import time

BEGAN = time.monotonic()  # before torch is loaded, which takes its part of the minutes

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to ask for a GPU makes no context, before a fork

import torch  # noqa: E402
from support.on_device import MOCKED, forks  # noqa: E402

from benchmarks.gpu_check.processes import ToldToEnd, ends_in_order, run_part  # noqa: E402
from benchmarks.gpu_check.report import WHOLE, Check, exit_code, findings, page, runs_of, summary, table  # noqa: E402
from benchmarks.kit.environment import versions as installed  # noqa: E402
from benchmarks.kit.options import numbers  # noqa: E402


class Part(NamedTuple):
    """A part of the check.

    Args:
        title: What it is about.
        function: What carries it out, as `module:function`.
        expected_s: How long it takes on the GPU, as far as can be said before; it is not begun with less time left.
        limit_s: When it is ended; on a CPU, where other things may run, six times that.

    """

    title: str
    function: str
    expected_s: float
    limit_s: float


# Seconds as calculated for an H200, before any run: a process that uses CUDA takes 4 to start, a group of NCCL 2.
START_S, RESERVE_S = 15.0, 25.0  # torch is loaded, and a fork tried; what nobody has thought of
PARTS = (
    # three processes 10; transfers of 1 GiB and half of it, from pageable memory the slowest, 3
    Part("sanity", "benchmarks.gpu_check.sanity:run", 15, 40),
    # one process for NCCL and one for the CPU 8; some 50 calls, 5 on a CPU, each kernel loaded at its first use 10
    Part("units, one process", "benchmarks.gpu_check.tests:units", 25, 80),
    # two on the device, two on the CPU 10; 50 tests, 40 on two cores of a busy CPU, and through the host and back
    Part("two ranks by gloo on one device", "benchmarks.gpu_check.tests:two_ranks", 80, 150),
    # one process 6; 39 fits at 1, which is 0.2 on a CPU, each with a group of NCCL of its own
    Part("one rank under Lightning", "benchmarks.gpu_check.tests:one_rank", 45, 90),
    # four processes 10; 28 tests, 24 on two cores of a busy CPU
    Part("cyclic", "benchmarks.gpu_check.tests:cyclic", 35, 70),
    # twice two processes 15; 23 fits at 2, of which nine send a ResNet-50 by gloo
    Part("host waits", "benchmarks.gpu_check.waits:run", 65, 110),
    # four processes 15; six sizes of bucket, two types, three groups, two models
    Part("packing", "benchmarks.gpu_check.packing:run", 45, 80),
    # start 6; two models built 5; layers timed 3; a micro-batch of 64 takes 0.15 (ViT) and 0.06 (ResNet) in float32, 60
    # of each, and 0.03 in bfloat16, 210 of each: 13 + 13; memory given back and taken again 3
    Part("memory of the cyclic engine", "benchmarks.gpu_check.memory:run", 45, 80),
    # start 8; 11 fits of 27 steps at 0.1, and of 0.7 besides: 37; the model once 2
    Part("profiler", "benchmarks.gpu_check.profiler:run", 50, 80),
)
ORDER = (0, 1, 2, 3, 4, 5, 7, 8, 6)  # most of what part 6 finds has no rule, so that it may be left out first


def versions(device: str) -> dict[str, str]:
    """Return what the figures depend on. Touches no device, since processes are forked later."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cores": str(os.cpu_count())}
    found |= installed(("torch", "lightning", "numpy", "timm", "nvidia-nccl-cu13", "nvidia-nccl-cu12"))
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            found["device, driver, memory"] = told.stdout.strip().splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["device, driver, memory"] = f"not known ({error})"
    return found


def start_method(device: str) -> Any:
    """Return how processes are started: forked, all that is needed being loaded, if such a process can use the GPU."""
    import lightning_comm  # noqa: F401  (forked processes have it then)

    return multiprocessing.get_context("fork" if forks(device) else "spawn")


def numbers_of(text: str) -> list[int]:
    """Return the numbers of parts, each once.

    >>> numbers_of("0-2,5,1")
    [0, 1, 2, 5]
    """
    return numbers(text, len(PARTS) - 1)


def minutes_of(text: str) -> float:
    """Return how long everything may take."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text!r}; give a number above 0; 8 is enough for all parts")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; end with a message where they cannot be meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--minutes", type=minutes_of, default=8.0, help="for everything, this program's start included")
    parser.add_argument("--device", choices=("cuda", "cpu", "mock"), default="cuda")
    parser.add_argument("--parts", type=numbers_of, help="their numbers, by commas, in this order; default: all")
    args = parser.parse_args(arguments)
    args.parts = [number for number in ORDER if number < len(PARTS)] if args.parts is None else args.parts
    args.out = args.out.resolve()
    if args.device == "cuda" and not torch.cuda.device_count():
        parser.error(
            "--device: 'cuda' needs a GPU, and torch finds none; give 'cpu', which shows that the check works, or "
            "'mock', which runs the lines that are for a GPU"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        others = {each["device"] for each in findings(args.out) if "device" in each} - {args.device}
    except OSError as error:
        parser.error(f"--out: {str(args.out)!r} cannot be a folder for results ({error.strerror}); give another one")
    args.versions = versions(args.device)
    if others or _another_card(args.out, args.versions):
        parser.error(
            f"--out: {str(args.out)!r} holds results of another device"
            f"{''.join(f' ({each})' for each in sorted(others))}, and this run is for {args.device!r}; "
            "give a folder for each device"
        )
    return args


CARD = "device, driver, memory"


def _another_card(out: Path, told: dict[str, str]) -> bool:
    """Whether the results in a folder, if there are any, are of another GPU."""
    before = out / "versions.json"
    found = json.loads(before.read_text()).get(CARD) if before.exists() and findings(out) else None
    cards = {card for card in (found, told.get(CARD)) if card is not None and not card.startswith("not known")}
    return len(cards) == 2


class Session:
    """A run of the check: some parts, one after the other, and what they find.

    Args:
        args: Of the command line.
        began: When this program began, by the monotonic clock.

    """

    def __init__(self, args: argparse.Namespace, began: float) -> None:
        self.out, self.device, self.versions = args.out, args.device, args.versions
        self._ends = began + 60 * args.minutes
        self._begun: list[int] = []

    def check_of(self, number: int, *, again: bool) -> Check:
        """Return what a part is told, in a run that begins, or in the last one."""
        run = max(1, runs_of(findings(self.out), number) + again)
        device = "cpu" if self.device == "cpu" else "cuda"
        return Check(number, device, self.out, tiny=self.device != "cuda", name=self.device, run=run)

    def carry_out(self, numbers: list[int]) -> int:
        """Run parts; what is found is written down after each, and when the program is told to end."""
        with ends_in_order():
            try:
                context = start_method(self.device)
                for number in numbers:
                    self._carry_out(number, context)
                    self.write()
            except ToldToEnd as told:
                for number in numbers:
                    if number not in self._begun:
                        self._leave_out(number, str(told))
                self.write()
                return told.exit_code
        return exit_code(findings(self.out))

    def _carry_out(self, number: int, context: Any) -> None:
        part, left_s, since = PARTS[number], self._ends - time.monotonic(), time.monotonic()
        if left_s < part.expected_s:
            self._leave_out(number, f"{left_s:.0f} s were left")
            return
        limit_s = min(part.limit_s * (1 if self.device == "cuda" else 6), left_s)
        before, check = len(findings(self.out)), self.check_of(number, again=True)
        self._begun.append(number)
        try:
            run_part(part.function, check, part.expected_s, limit_s, context)
        except ToldToEnd as told:
            after = f"{told} after {time.monotonic() - since:.0f} s"
            check.note(WHOLE, after, f"{part.expected_s:.0f} s", "ends", verdict="fails")
            raise
        finally:
            found = summary(findings(self.out)[before:], time.monotonic() - since)
            print(f"part {number}, {part.title}: {found}", flush=True)

    def _leave_out(self, number: int, why: str) -> None:
        part = PARTS[number]
        check = self.check_of(number, again=False)
        check.note(WHOLE, why, f"{part.expected_s:.0f} s", "", verdict="left out")
        print(f"part {number}, {part.title}: LEFT OUT", flush=True)

    def write(self) -> None:
        """Write the page."""
        titles = [part.title for part in PARTS]
        (self.out / "page.md").write_text(page(findings(self.out), self.versions, self.device, titles))


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    """Run the parts that were asked for, as far as time allows; return the exit code.

    Args:
        arguments: Those of the command line, if not given.
        began: When this program began, by the monotonic clock; now, if not given.

    """
    began = time.monotonic() if began is None else began
    args = options(arguments)
    print("\n".join(f"{name}: {value}" for name, value in args.versions.items()), flush=True)
    (args.out / "versions.json").write_text(json.dumps(args.versions, indent=1))
    os.environ[MOCKED] = str(int(args.device == "mock"))
    try:
        return Session(args, began).carry_out(args.parts)
    finally:
        shutil.rmtree(args.out / "scratch", ignore_errors=True)
        print(table(findings(args.out)), flush=True)


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
