"""What can be shown on one GPU in eight minutes: correctness, host waits, and what packing, memory and profiling cost.

    python benchmarks/gpu_check.py --out DIR [--minutes 8] [--device cuda|cpu] [--parts 0,1,5]

Each part runs in a process of its own with a limit of its own, and writes a line of JSON into DIR/results.jsonl as soon
as something is found: what was measured, beside what was expected before it was run, and the rule between the two. A
part that breaks, or is too slow, ends alone. What does not fit into the minutes any more is left out, by name. In the
end there is a table, and DIR/page.md for docs/results. A run with --parts adds to what is in DIR. The exit code is 1 if
something fails.

`--device cpu` runs the same with tiny sizes, to see that the script works; what only CUDA can show is said to need it.
`--device mock` runs the lines that are for a GPU, with tiny sizes, on one that is not there; its figures mean nothing.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to ask for a GPU makes no context, before a fork
ROOT = Path(__file__).resolve().parents[1]
if "lightning_comm" not in sys.modules:  # the one beside this file, installed or not
    sys.path.insert(0, str(ROOT))
for folder in (ROOT / "tests", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402
from gpu_check_report import Check, findings, page, summary, table  # noqa: E402
from support.on_device import MOCKED, forks  # noqa: E402


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


PARTS = (
    Part("sanity", "gpu_check_sanity:run", 15, 40),
    Part("units, one process", "gpu_check_tests:units", 45, 80),
    Part("two ranks by gloo on one device", "gpu_check_tests:two_ranks", 90, 150),
    Part("one rank under Lightning", "gpu_check_tests:one_rank", 30, 60),
    Part("cyclic", "gpu_check_tests:cyclic", 30, 60),
    Part("host waits", "gpu_check_waits:run", 40, 80),
    Part("packing", "gpu_check_packing:run", 45, 80),
    Part("memory of the cyclic engine", "gpu_check_memory:run", 60, 90),
    Part("profiler", "gpu_check_profiler:run", 30, 60),
)


def versions(device: str) -> dict[str, str]:
    """Return what the figures depend on. Touches no device, since processes are forked later."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cores": str(os.cpu_count())}
    for name in ("torch", "lightning", "numpy", "timm", "nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            found["device, driver, memory"] = told.stdout.strip().splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["device, driver, memory"] = f"not known ({error})"
    return found


def _check_of(number: int, device: str, out: Path) -> Check:
    return Check(number, "cpu" if device == "cpu" else "cuda", out, tiny=device != "cuda")


def _carry_out(number: int, device: str, out: Path) -> None:
    """Run a part in a process of its own, whose children belong to its group and end with it."""
    os.setsid()
    log = os.open(out / f"part{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ.pop("CUDA_LAUNCH_BLOCKING", None)  # it hides what happens when nobody waits
    (out / "scratch").mkdir(exist_ok=True)
    os.chdir(out / "scratch")
    check = _check_of(number, device, out)
    try:
        module, function = PARTS[number].function.split(":")
        getattr(import_module(module), function)(check)
    except BaseException as error:
        traceback.print_exc()
        check.note("the whole part", f"{type(error).__name__}: {error}"[:300], "it ends", "no error", verdict="fails")
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run_part(number: int, device: str, out: Path, limit_s: float, context: Any) -> None:
    """Run a part, and end it with all its processes when its time is over."""
    part, check = PARTS[number], _check_of(number, device, out)
    process = context.Process(target=_carry_out, args=(number, device, out))
    process.start()
    process.join(limit_s)
    slow = process.exitcode is None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(10)
    if slow:
        check.note(
            "the whole part", f"ended after {limit_s:.0f} s", f"{part.expected_s:.0f} s", "ends", verdict="fails"
        )
    elif process.exitcode not in (0, 1):
        check.note("the whole part", f"exit code {process.exitcode}", 0, "==", verdict="fails")


def start_method(device: str) -> Any:
    """Return how processes are started: forked, all that is needed being loaded, if such a process can use the GPU."""
    import lightning_comm  # noqa: F401  (forked processes have it then)

    return multiprocessing.get_context("fork" if forks(device) else "spawn")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for, as far as time allows; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, this program's start included")
    parser.add_argument("--device", choices=("cuda", "cpu", "mock"), default="cuda")
    parser.add_argument("--parts", default=",".join(map(str, range(len(PARTS)))), help="their numbers, by commas")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    numbers = [int(each) for each in args.parts.split(",")]
    if unknown := [number for number in numbers if not 0 <= number < len(PARTS)]:
        parser.error(f"--parts: there are 0 to {len(PARTS) - 1}; got {unknown}")
    if args.device == "cuda" and not torch.cuda.device_count():
        parser.error(
            "--device: 'cuda' needs a GPU, and torch finds none; give 'cpu', which shows that the check works, or "
            "'mock', which runs the lines that are for a GPU"
        )
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    told = versions(args.device)
    print("\n".join(f"{name}: {value}" for name, value in told.items()), flush=True)
    (out / "versions.json").write_text(json.dumps(told, indent=1))
    os.environ[MOCKED] = str(int(args.device == "mock"))
    context = start_method(args.device)
    for number in numbers:
        part, left_s = PARTS[number], 60 * args.minutes - (time.monotonic() - began)
        if left_s < part.expected_s:
            check = _check_of(number, args.device, out)
            check.note(
                "the whole part", f"{left_s:.0f} s were left", f"{part.expected_s:.0f} s", "", verdict="left out"
            )
            print(f"part {number}, {part.title}: LEFT OUT", flush=True)
            continue
        limit_s = min(part.limit_s * (1 if args.device == "cuda" else 6), left_s)
        before, since = len(findings(out)), time.monotonic()
        run_part(number, args.device, out, limit_s, context)
        print(f"part {number}, {part.title}: {summary(findings(out)[before:], time.monotonic() - since)}", flush=True)
    shutil.rmtree(out / "scratch", ignore_errors=True)
    found = findings(out)
    print(table(found))
    (out / "page.md").write_text(page(found, told, args.device, [part.title for part in PARTS]))
    return int(any(each["verdict"] == "fails" for each in found))


if __name__ == "__main__":
    sys.exit(main())
