"""Step times of plain DDP, its compression hooks, other tools for local updates, and ours, on emulated hosts.

    python benchmarks/tools.py [--hosts 2 4] [--links 100mbit 500mbit 1gbit] [--repeats 5]

Everything runs in the lab (`lightning_comm.lab`), with emulated devices. Tools that may end their process are tried in
processes of their own first, and left out with the error they gave. The results, `docs/results/tools_<date>.md` and a
JSON file with every repeat beside it, are written again after each repeat, so that an interruption loses nothing.
accelerate and torchft are optional: `pip install -e ".[benchmark]"`.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from emulated_run import Listener, environment, error_of
from emulated_steps import Job
from tools_methods import TOOLS
from tools_report import LIMIT, OURS, PLAIN, page

from lightning_comm.lab.cluster import Lab, unavailable

_HERE = Path(__file__).resolve().parent
_TRIAL_TIMEOUT_S, _TIMEOUT_S = 60, 1800


def main() -> None:
    """Run all configurations and write the results file."""
    options = _options()
    if (missing := unavailable()) is not None:
        sys.exit(f"tools.py needs emulated hosts: {missing}")
    settings = {name: getattr(options, name) for name in ("model", "image", "batch", "step_s", "period")}
    settings["model_args"] = {"img_size": options.image}
    network = Job(**settings).network()
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/tools.py", *sys.argv[1:]]),
        "environment": environment(),
        "settings": {**settings, "parameters": sum(parameter.numel() for parameter in network.parameters())},
        "could_not_run": [],
        "configurations": [],
    }
    out = Path(options.out or _HERE.parent / "docs" / "results" / f"tools_{report['date']}.md")
    for hosts in options.hosts:
        usable = _usable(options.tools, hosts, settings, report)
        for link in options.links:
            run = {**settings, "repeats": options.repeats, "tools": usable, "trial": ""}
            while (broken := _compare(hosts, link, run, report, out)) in usable:
                usable.remove(broken)  # and once more without it
    print(f"\n{out}\n{out.with_suffix('.json')}")


def _usable(names: list[str], hosts: int, settings: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """Return the tools that run with so many hosts; try the risky ones in processes of their own."""
    usable = []
    for name in names:
        error = _trial(name, hosts, settings) if TOOLS[name].risky else ""
        if error:
            _leave_out(name, hosts, error, report)
        else:
            usable.append(name)
    return usable


def _trial(name: str, hosts: int, settings: dict[str, Any]) -> str:
    print(f"{hosts} hosts: trying {TOOLS[name].label}", flush=True)
    with Lab(hosts, "1gbit") as lab:
        error = error_of(lab.run(_command({**settings, "trial": name}), timeout_s=_TRIAL_TIMEOUT_S))
    return f"{error}\nin a trial of {5 * settings['period']} steps and at most {_TRIAL_TIMEOUT_S} s" if error else ""


def _leave_out(name: str, hosts: int, error: str, report: dict[str, Any]) -> None:
    print(f"  left out: {TOOLS[name].label}: {'; '.join(error.strip().splitlines()[-2:])}", flush=True)
    report["could_not_run"].append({"tool": name, "label": TOOLS[name].label, "hosts": hosts, "error": error})


def _compare(hosts: int, link: str, options: dict[str, Any], report: dict[str, Any], out: Path) -> str:
    """Measure one configuration; return the name of the tool that ended it, if one did that may."""
    print(f"{hosts} hosts, {link}", flush=True)
    found: dict[str, Any] = {"hosts": hosts, "link": link, "repeats": [], "error": ""}
    found["once_a_period"] = [n for n in options["tools"] if TOOLS[n].communicates and not TOOLS[n].every_step]
    report["configurations"].append(found)

    def on_result(result: dict[str, Any]) -> None:
        if "repeat" in result:
            found["labels"] = result.pop("labels")
            found["repeats"].append(result)
        else:
            found.update(result)
        _write(report, out)

    listener = Listener(on_result)
    with Lab(hosts, link) as lab:
        found["error"] = error_of(lab.run(_command(options), timeout_s=_TIMEOUT_S, on_line=listener))
    at = listener.at
    broken = at if found["error"] and at in TOOLS and TOOLS[at].risky else ""
    if broken:
        report["configurations"].remove(found)
        _leave_out(broken, hosts, found["error"], report)
    _write(report, out)
    return broken


def _command(options: dict[str, Any]) -> list[str]:
    return [sys.executable, str(_HERE / "tools_host.py"), json.dumps(options)]


def _write(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.write_text(page(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--links", nargs="+", default=["100mbit", "500mbit", "1gbit"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--step-s", type=float, default=0.15)
    parser.add_argument("--period", type=int, default=8)
    parser.add_argument("--out", help="the Markdown file; docs/results/tools_<date>.md by default")
    options = parser.parse_args()
    options.tools = [name for name in TOOLS if name in {*options.tools, LIMIT, PLAIN, OURS}]  # these the report needs
    return options


if __name__ == "__main__":
    main()
