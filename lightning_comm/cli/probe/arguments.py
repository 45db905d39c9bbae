"""The arguments of ``lightning-comm probe``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_comm.core.probe_plan import MAX_BYTES, MIN_BYTES, ProbePlan, sizes_between

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def check(args: Sequence[str]) -> int:
    """Return 0; what is wrong with the arguments ends the process."""
    parse(args)
    return 0


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Return the options, and the plan that they make."""
    parser = argparse.ArgumentParser(
        prog="lightning-comm probe",
        description="Measure the link between the ranks of a job: alone with --devices, or under torchrun, srun or "
        "`lightning-comm lab`, once on every rank.",
    )
    parser.add_argument("--devices", type=int, help="processes on each host (default: what the launcher says)")
    parser.add_argument("--num-nodes", type=int, help="hosts (default: what the launcher says)")
    parser.add_argument("--accelerator", default="auto", help="as in the Trainer: auto, cpu, gpu (default: auto)")
    parser.add_argument("--backend", help="of the process group: gloo, nccl (default: that of the accelerator)")
    parser.add_argument("--sizes", type=_sizes, metavar="A,B,...", help="payloads to measure: 4,64KiB,16MiB")
    parser.add_argument("--min-bytes", type=_bytes, metavar="SIZE", help="least payload (default: 4)")
    parser.add_argument("--max-bytes", type=_bytes, metavar="SIZE", help="greatest payload (default: 64MiB)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each size (default: 5)")
    parser.add_argument("--seconds", type=float, default=12.0, help="time it may take, start apart (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("probe.json"), metavar="FILE", help="default: probe.json")
    options = parser.parse_args(args)
    if options.sizes and (options.min_bytes or options.max_bytes):
        parser.error("`--sizes` names all payloads, so `--min-bytes` and `--max-bytes` cannot stand beside it.")
    try:
        sizes = options.sizes or sizes_between(
            MIN_BYTES if options.min_bytes is None else options.min_bytes,
            MAX_BYTES if options.max_bytes is None else options.max_bytes,
        )
        options.plan = ProbePlan(sizes, options.repeats, options.seconds)
    except ValueError as error:
        parser.error(str(error))
    return options


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"a size is a whole number and B, KiB, MiB, GiB, kB, MB or GB; got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_bytes(part) for part in text.split(",")}))
