"""``lightning-comm lab``: run a command once on each of several emulated hosts, joined by links of stated rates."""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from lightning_comm.core.rates import parse_rate
from lightning_comm.lab.cluster import Lab, LabError, LabResult, check_arguments, unavailable

_NOT_AVAILABLE, _NOBODY_READS = 1, 128 + signal.SIGPIPE
_LAST_LINES = 5  # of the host that failed, shown again after what the others printed while they were ended
_EPILOG = """\
examples:
  lightning-comm lab --hosts 4 --link 100mbit -- lightning-comm fit --config configs/qsr.yaml
  lightning-comm lab --hosts 3 --link 1gbit,1gbit,100mbit -- lightning-comm probe
  lightning-comm lab --hosts 2 --link 1gbit --fault '5s cut 1' --fault '8s restore 1' -- python train.py

On the hosts the command finds the environment that Lightning, torchrun and init_process_group read.
`lightning-comm fit` takes the number of hosts and devices from the lab; a script of your own says
Trainer(num_nodes=HOSTS, devices=1).
"""
_NOTHING_SLOWED = (
    "lightning-comm lab: `--speed` is for emulated devices, and no process of the job had one that takes its speed "
    "from the lab, so nothing was slowed. Give the Trainer EmulatedDevice(step_s=0.1, batch_size=16), with the numbers "
    "of a device of speed 1, or give `lightning-comm fit` --trainer.callbacks+=lightning_comm.callbacks.EmulatedDevice "
    "--trainer.callbacks.step_s=0.1 --trainer.callbacks.batch_size=16."
)


class _Ended(Exception):
    """SIGTERM or Ctrl-C; carries the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, or that of the first host on which it failed."""
    options, command = _parse(sys.argv[1:] if argv is None else list(argv))
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if (missing := unavailable()) is not None:
            print(f"lightning-comm lab: {missing}.", file=sys.stderr)
            return _NOT_AVAILABLE
        with Lab(options.hosts, options.link, speeds=options.speed, devices_per_host=options.devices_per_host) as lab:
            _plan_faults(lab, options.fault)
            result = lab.run(command, timeout_s=options.timeout, on_line=_show(options.hosts))
            if result.host is None and not lab.speeds_taken and any(speed != 1 for speed in options.speed or ()):
                print(_NOTHING_SLOWED, file=sys.stderr)
            return _report(result)
    except _Ended as ended:
        print("lightning-comm lab: interrupted; every host has been ended.", file=sys.stderr)
        return ended.status
    except BrokenPipeError:  # as where `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which is flushed once more at the very end
        return _NOBODY_READS
    except (LabError, OSError) as error:
        print(f"lightning-comm lab: {error}.", file=sys.stderr)
        return _NOT_AVAILABLE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the clean-up is under way, and is quick
    raise _Ended(number)


def _prefix(host: int, hosts: int) -> str:
    return f"[host {host:>{len(str(hosts - 1))}}]"


def _show(hosts: int) -> Callable[[int, str, bool], None]:
    def show(host: int, line: str, is_error: bool) -> None:
        print(f"{_prefix(host, hosts)} {line}", file=sys.stderr if is_error else sys.stdout, flush=True)

    return show


def _report(result: LabResult) -> int:
    if result.host is not None and (last := result.output[result.host].splitlines()[-_LAST_LINES:]):
        prefix = _prefix(result.host, len(result.output))
        print(f"The end of the output of host {result.host}, which failed first:", file=sys.stderr)
        print(*(f"{prefix} {line}" for line in last), sep="\n", file=sys.stderr)
    if result.returncode != 0:
        ended = "all" if result.host is None else "the others"
        print(f"lightning-comm lab: {result.why}; {ended} were ended.", file=sys.stderr)
    return result.returncode


@dataclass(frozen=True)
class Fault:
    """Something that is to happen to a host while the job runs.

    Args:
        after_s: Seconds after the start of the job.
        what: ``cut``, ``restore``, ``stop``, ``resume``, ``kill`` or ``link``.
        host: Which host.
        rate: For ``link``, the new rate.

    """

    after_s: float
    what: str
    host: int
    rate: str = ""

    def happen(self, lab: Lab) -> None:
        """Let it happen."""
        if self.what == "link":
            lab.set_link(self.host, self.rate)
        else:
            getattr(lab, self.what)(self.host)


_FAULT = re.compile(
    r"(?P<after>\d+(?:\.\d+)?)s "
    r"(?:(?P<what>cut|restore|stop|resume|kill) (?P<host>\d+)|link (?P<of>\d+) (?P<rate>\S+))"
)


def _fault(text: str) -> Fault:
    match = _FAULT.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            "a fault must be a time, one of cut, restore, stop, resume, kill, and a host; or a time, link, a host and "
            f"a rate; got {text!r}. '5s cut 1' and '5s link 1 10mbit' are faults"
        )
    if match["rate"]:
        try:
            parse_rate(match["rate"])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return Fault(float(match["after"]), "link", int(match["of"]), match["rate"])
    return Fault(float(match["after"]), match["what"], int(match["host"]))


def _plan_faults(lab: Lab, faults: Sequence[Fault]) -> None:
    """Let each fault happen when its time has come, beside the job."""

    def happen() -> None:
        began = time.monotonic()
        for fault in sorted(faults, key=lambda fault: fault.after_s):
            time.sleep(max(0.0, began + fault.after_s - time.monotonic()))
            text = f"{fault.what} {fault.host} {fault.rate}".strip()
            print(f"lightning-comm lab: {text}, after {fault.after_s:g} s.", file=sys.stderr, flush=True)
            try:
                fault.happen(lab)
            except (LabError, ValueError) as error:
                print(f"lightning-comm lab: {text} failed: {error}", file=sys.stderr, flush=True)

    if faults:
        threading.Thread(target=happen, daemon=True).start()


def _rates(text: str) -> list[str]:
    return text.split(",")


def _speeds(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"speeds must be numbers with commas between them; got {text!r}. '1,1,0.5' is three hosts' speeds"
        ) from None


def _no_command(own: list[str], command: list[str], rest: list[str]) -> str:
    """Return what is wrong with arguments that have no command, or more than the lab's options take."""
    if rest and (command or rest[0].startswith("-")):
        return f"unrecognized arguments: {shlex.join(rest)}. The command is what stands behind `--`"
    at = own.index(rest[0]) if rest else len(own)  # where the command begins
    arguments = [*(own[:at] or ["--hosts", "2"]), "--", *(own[at:] or ["python", "train.py"])]
    return f"the command is missing. Write it behind `--`: {shlex.join(['lightning-comm', 'lab', *arguments])}"


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, command = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="lightning-comm lab",
        usage="lightning-comm lab [options] -- COMMAND ...",
        description="Run a command once on each of several emulated hosts on this Linux machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hosts", type=int, default=2, help="how many hosts (default: %(default)s)")
    add("--link", type=_rates, default=["1gbit"], metavar="RATE[,RATE...]",
        help="rate of every link, or one for each host: 100mbit, 1gbit (default: 1gbit)")  # fmt: skip
    add("--speed", type=_speeds, metavar="SPEED,...", help="speed of each host's emulated device (EmulatedDevice)")
    add("--devices-per-host", type=int, default=1, help="processes of the job on each host (default: %(default)s)")
    add("--timeout", type=float, metavar="SECONDS", help="end the job after so long, with exit status 124")
    add("--fault", type=_fault, action="append", default=[], metavar="'5s cut 1'",
        help="let something happen while the job runs: cut, restore, stop, resume or kill a host, or "
        "'5s link 1 10mbit'; may be repeated")  # fmt: skip
    options, rest = parser.parse_known_args(own)
    if rest or not command:
        parser.error(_no_command(own, command, rest))
    if shutil.which(command[0]) is None:
        found = os.path.exists(command[0])
        way_out = "It is there, but cannot be executed." if found else "Give its full path."
        parser.error(f"the command must be a program that is found on the PATH; got {command[0]!r}. {way_out}")
    if options.timeout is not None and not options.timeout > 0:
        parser.error(
            f"`--timeout` is a time in seconds, so it must be > 0; got {options.timeout}. Leave it out for none."
        )
    options.link = options.link[0] if len(options.link) == 1 else options.link
    try:
        check_arguments(options.hosts, options.link, options.speed, options.devices_per_host)
    except ValueError as error:
        parser.error(str(error))
    for fault in options.fault:
        if fault.host >= options.hosts:
            parser.error(
                f"`--fault` names host {fault.host}, and hosts are 0 to {options.hosts - 1}; they count from 0."
            )
    return options, command


if __name__ == "__main__":
    sys.exit(main())
