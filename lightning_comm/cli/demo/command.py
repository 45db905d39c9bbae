"""``lightning-comm demo``: train real digits with DDP, local SGD and QSR, and report bytes and accuracy of each.

Every run has processes of its own (:mod:`lightning_comm.cli.demo.run`), so that none can disturb the next. What each
method takes in time is then measured by a pilot on emulated hosts (:mod:`lightning_comm.cli.demo.pilot`). All figures
and sentences of the report are computed from their results (:mod:`lightning_comm.cli.demo.report`).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_comm.cli.demo import report
from lightning_comm.cli.demo.arguments import check, parse
from lightning_comm.cli.demo.run import PROGRESS, RunSettings
from lightning_comm.cli.environment import environment
from lightning_comm.cli.fresh_python import fresh_python
from lightning_comm.core.local_update.periods import QuadraticPeriod
from lightning_comm.core.quantities import megabytes, percent
from lightning_comm.core.whole_files import write_text
from lightning_comm.reports.pieces import text_table

METHODS = ("ddp", "local_sgd", "qsr")
_SHOWN_OF_A_FAILURE = 40  # lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 1 if a run failed."""
    argv = sys.argv[1:] if argv is None else argv
    if (code := check(argv)) != 0:
        return code
    arguments = parse(argv)
    folder = Path(arguments.out) / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    (folder / "logs").mkdir(parents=True)  # fails if it is there: no result is ever overwritten
    results: dict[str, Any] = {
        "command": shlex.join(["lightning-comm", "demo", *argv]),
        "settings": _settings(arguments),
        "environment": environment(),
        "runs": [],
        "pilot": None,
    }
    runs = [
        RunSettings(method, seed, arguments.devices, arguments.epochs, arguments.lr, arguments.batch_size)
        for seed in range(arguments.seeds)
        for method in METHODS
    ]
    print(
        f"Training a small ViT on 1,437 real handwritten digits: {arguments.devices} processes, {arguments.epochs} "
        f"epochs, {len(runs)} runs."
    )
    for index, run in enumerate(runs, start=1):
        result = run_one(run, folder, f"[{index}/{len(runs)}] {report.NAMES[run.method]}, seed {run.seed}")
        if result is None:
            return 1
        results["runs"].append(result)
        write_text(folder / "results.json", json.dumps(results, indent=1))  # after each run, so that none is lost
    failed = arguments.pilot_repeats > 0 and not _compare_times(results, runs[0], arguments.pilot_repeats, folder)
    _write_and_show(results, folder)
    return 1 if failed else 0


def _compare_times(results: dict[str, Any], run: RunSettings, repeats: int, folder: Path) -> bool:
    """Add the pilot's results, or print in one line why there are none; return whether that is as expected."""
    from lightning_comm.cli.demo import pilot as demo_pilot  # it loads torch, which training does not need here

    print(f"\nTimes on {run.devices} emulated hosts, joined by links of {demo_pilot.LINK}:")
    found = demo_pilot.compare(METHODS, run, repeats, folder)
    if isinstance(found, str):
        print(found)
        return found.startswith("Times")
    results["pilot"] = found
    write_text(folder / "results.json", json.dumps(results, indent=1))
    return True


def run_one(run: RunSettings, folder: Path, label: str) -> dict[str, Any] | None:
    """Train in fresh processes and show how far they are; return the result, or ``None`` after showing why not."""
    name = f"{run.method}-seed{run.seed}"
    log, result_file = folder / "logs" / f"{name}.log", folder / f"{name}.json"
    command = fresh_python("lightning_comm.cli.demo.run", json.dumps(asdict(run)), str(result_file))
    # One thread a process: the processes share the cores.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    show = _progress_line(label, run.epochs)
    try:
        with log.open("w") as log_file:
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    show(json.loads(line.removeprefix(PROGRESS)))
                else:
                    log_file.write(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
    if code != 0 or not result_file.exists():
        last = log.read_text().splitlines()[-_SHOWN_OF_A_FAILURE:]
        print(f"\n{label} failed with exit code {code}. The end of its output ({log}):", *last, sep="\n")
        return None
    result: dict[str, Any] = json.loads(result_file.read_text())
    result_file.unlink()  # it goes into results.json
    return result


def _progress_line(label: str, epochs: int) -> Callable[[dict[str, float]], None]:
    on_terminal = sys.stdout.isatty()

    def show(point: dict[str, float]) -> None:
        last = point["epoch"] == epochs
        text = (
            f"{label}: epoch {point['epoch']:.0f} of {epochs}, accuracy {percent(point['accuracy'])}, "
            f"{megabytes(point['training_wire_bytes'])} sent, {point['wall_s']:.0f} s"
        )
        if on_terminal:
            print(f"\r{text:<100}", end="\n" if last else "", flush=True)
        elif last:
            print(text, flush=True)

    if on_terminal:
        print(f"\r{label}: starting ...", end="", flush=True)
    return show


def _write_and_show(results: dict[str, Any], folder: Path) -> None:
    from lightning_comm.cli.demo import figure

    png = folder / "figure.png"
    figure.draw(results, png)
    (folder / "report.html").write_text(report.html_page(results, png.read_bytes()))
    (folder / "report.md").write_text(report.markdown(results))
    print()
    print(text_table(*report.summary_table(results)))
    print()
    for sentence in report.conclusions(results):
        print(sentence)
    print()
    for what, path in (("Report", "report.html"), ("Figure", "figure.png"), ("Numbers", "results.json")):
        print(f"{what + ':':<9}{(folder / path).resolve()}")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    rule = QuadraticPeriod().resolve(family="adam", peak_lr=arguments.lr)
    chosen = {name: getattr(arguments, name) for name in ("devices", "epochs", "seeds", "lr", "batch_size")}
    return {**chosen, "alpha": rule.alpha, "h_base": rule.h_base}


if __name__ == "__main__":
    sys.exit(main())
