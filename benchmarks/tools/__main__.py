"""Step times of plain DDP, its compression hooks, other tools for local updates, and ours, on emulated hosts.

    python -m benchmarks.tools [--hosts 2 4] [--links 100mbit 500mbit 1gbit] [--repeats 5]

Everything runs in the lab (`lightning_comm.lab`), with emulated devices. Tools that may end their process are tried in
processes of their own first, and left out with the error they gave. The results, `docs/results/tools_<date>.md` and a
JSON file with every repeat beside it, are written again after each repeat, so that an interruption loses nothing.
accelerate and torchft are optional: `pip install -e ".[benchmark]"`.
"""

import argparse
from typing import Any

from benchmarks.kit.hosts import Comparison, as_host, error_of, measure, need_hosts
from benchmarks.kit.options import Parser, chosen, settings_of
from benchmarks.kit.results import Results
from benchmarks.kit.step_times import DDP, LIMIT
from benchmarks.kit.training import Job
from benchmarks.tools.methods import TOOLS
from benchmarks.tools.report import OURS, PAGE
from lightning_comm.lab.cluster import Lab

_TRIAL_TIMEOUT_S, _TIMEOUT_S = 60, 1800


def main() -> None:
    """Run all configurations and write the results file."""
    given = options()
    need_hosts()
    settings = settings_of(given, "model", "image", "batch", "step_s", "period")
    settings["model_args"] = {"img_size": given.image}
    whole = {**settings, "parameters": Job(**settings).parameters}
    results = Results(PAGE, given.out, settings=whole, could_not_run=[], configurations=[])
    for hosts in given.hosts:
        usable = _usable(given.tools, hosts, settings, results)
        for link in given.links:
            run = {**settings, "repeats": given.repeats, "tools": usable, "trial": ""}
            while (broken := _compare(Comparison(f"{hosts} hosts, {link}", hosts, link, run), results)) in usable:
                usable.remove(broken)  # and once more without it
    results.tell()


def _usable(names: list[str], hosts: int, settings: dict[str, Any], results: Results) -> list[str]:
    """Return the tools that run with so many hosts; try the risky ones in processes of their own."""
    usable = []
    for name in names:
        error = _trial(name, hosts, settings) if TOOLS[name].risky else ""
        if error:
            _leave_out(name, hosts, error, results)
        else:
            usable.append(name)
    return usable


def _trial(name: str, hosts: int, settings: dict[str, Any]) -> str:
    print(f"{hosts} hosts: trying {TOOLS[name].label}", flush=True)
    command = as_host("tools.host", {**settings, "trial": name})
    with Lab(hosts, "1gbit") as lab:
        error = error_of(lab.run(command, timeout_s=_TRIAL_TIMEOUT_S))
    return f"{error}\nin a trial of {5 * settings['period']} steps and at most {_TRIAL_TIMEOUT_S} s" if error else ""


def _leave_out(name: str, hosts: int, error: str, results: Results) -> None:
    print(f"  left out: {TOOLS[name].label}: {'; '.join(error.strip().splitlines()[-2:])}", flush=True)
    left = {"tool": name, "label": TOOLS[name].label, "hosts": hosts, "error": error}
    results.report["could_not_run"].append(left)


def _compare(comparison: Comparison, results: Results) -> str:
    """Measure one configuration; return the name of the tool that ended it, if one did that may."""
    print(comparison.title, flush=True)
    tools = [TOOLS[name] for name in comparison.options["tools"]]
    named = zip(comparison.options["tools"], tools, strict=True)
    found = comparison.begin(once_a_period=[name for name, each in named if each.communicates and not each.every_step])
    configurations = results.report["configurations"]
    configurations.append(found)
    at = measure("tools.host", comparison, found, results.write, _TIMEOUT_S)
    broken = at if found["error"] and at in TOOLS and TOOLS[at].risky else ""
    if broken:
        configurations.remove(found)
        _leave_out(broken, comparison.hosts, found["error"], results)
        results.write()
    return broken


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--links", nargs="+", default=["100mbit", "500mbit", "1gbit"])
    parser.number("--repeats", 5)
    parser.some("--tools", TOOLS)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.number("--image", 32)
    parser.number("--batch", 4, "samples of a step on each host")
    parser.number("--step-s", 0.15, "seconds of forward and backward")
    parser.number("--period", 8, "steps between synchronisations")
    parser.results(PAGE)
    given = parser.parse_args(arguments)
    given.tools = chosen(given.tools, TOOLS, always=[LIMIT, DDP, OURS])  # these the report needs
    return given


if __name__ == "__main__":
    main()
