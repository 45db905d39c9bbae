"""``lightning-comm probe``: measures the link between the ranks of a job, prints a report, and saves the figures.

Processes are started, and torchrun and SLURM recognised, by Lightning; what is measured is in
:mod:`lightning_comm.instruments.probe`.
"""

import argparse
import json
import os
import platform
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from typing_extensions import override

from lightning_comm.cli.environment import version_of
from lightning_comm.cli.probe.arguments import parse
from lightning_comm.cli.quiet import lightning_is_quiet
from lightning_comm.core.costs import LinkProfile
from lightning_comm.core.ledger import CommLedger
from lightning_comm.instruments.clocks import device_of_group, gather_json, json_from_rank_0
from lightning_comm.instruments.nccl_log import ways_taken
from lightning_comm.instruments.probe import device_of_messages, probe_link
from lightning_comm.reports.link import describe_link
from lightning_comm.transport.group_ends import leave_group_at_exit
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.start import all_ranks_started

_PATIENCE_S = 120  # beyond the budget, for a rank that died
_ALONE = (
    "lightning-comm probe: this job is one process, so there is no link to measure. Start two here with "
    "`lightning-comm probe --devices 2`, or the same command on several hosts with torchrun, srun or "
    "`lightning-comm lab`."
)


def main(args: Sequence[str]) -> int:
    """Measure the link and print the report; return 0, 1 if it failed, or 2 if nothing could be measured.

    Args:
        args: The arguments after ``lightning-comm probe``.

    Note:
        *Communication.* On every rank the same messages, for about ``--seconds``.

    """
    options = parse(args)
    leave_group_at_exit()
    with tempfile.TemporaryDirectory(prefix="lightning-comm-probe-") as logs, lightning_is_quiet():
        if torch.cuda.is_available():
            _have_nccl_log(logs)
        try:
            fabric = _fabric(options)
            if fabric.world_size == 1:
                print(_ALONE, file=sys.stderr)
                return 2
            fabric.launch()
        except (ValueError, RuntimeError, OSError) as error:
            print(f"lightning-comm probe: the job could not be started. {error}", file=sys.stderr)
            return 2
        return _measure(fabric, options, args)


def _measure(fabric: Fabric, options: argparse.Namespace, args: Sequence[str]) -> int:
    # Rank 0 will write the file, so it finds out whether it can, and all give up together before anything is measured.
    ledger = CommLedger()
    problem = json_from_rank_0(_problem_with(options.out) if fabric.is_global_zero else None, fabric.device, ledger)
    if problem is not None:
        if fabric.is_global_zero:
            print(problem, file=sys.stderr)
        return 2
    try:
        profile = probe_link(
            options.plan,
            host=_host(fabric.node_rank),
            node=fabric.node_rank,
            device=device_of_messages(fabric.device),
            environment=_environment(args),
            ledger=ledger,
        )
        profile = _with_transport(profile, fabric, ledger)
        Recorder(ledger).sent_by_others("barrier", "instruments", 0, fabric.barrier)
    except ValueError as error:  # on all ranks alike
        if fabric.is_global_zero:
            print(f"lightning-comm {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"lightning-comm probe: rank {fabric.global_rank} lost the others. {error}", file=sys.stderr)
        return 1
    return _report(profile, options.out) if fabric.is_global_zero else 0


def _report(profile: LinkProfile, out: Path) -> int:
    print(describe_link(profile))
    try:
        profile.save(out)
    except OSError as error:
        print(f"lightning-comm probe: `--out` could not be written after all. {error}", file=sys.stderr)
        return 1
    print(f"\nSaved in {out}, which CommProfiler(probe=...) reads.", flush=True)
    return 0


def _fabric(options: argparse.Namespace) -> Fabric:
    launched = shape_of_job(os.environ)
    devices, num_nodes = (
        _settle(name, asked, found)
        for name, asked, found in zip(
            ("--devices", "--num-nodes"), (options.devices, options.num_nodes), launched, strict=True
        )
    )
    in_lab = "LIGHTNING_COMM_LAB" in os.environ
    return Fabric(
        accelerator="cpu" if in_lab and options.accelerator == "auto" else options.accelerator,
        devices="auto" if devices is None else devices,
        num_nodes=1 if num_nodes is None else num_nodes,
        strategy=_PatientAtStart(
            process_group_backend=options.backend,
            timeout=timedelta(seconds=_PATIENCE_S + options.plan.seconds),
        ),
    )


class _PatientAtStart(DDPStrategy):
    """Fabric's DDP, whose time-out bounds the measurement, but not the start of processes."""

    @override
    def setup_environment(self) -> None:
        environment = self.cluster_environment
        if environment is None or dist.is_initialized():
            super().setup_environment()
            return
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)  # as Fabric is about to
        environment.set_world_size(self.num_nodes * self.num_processes)
        with all_ranks_started(
            "probe",
            environment.main_address,
            environment.main_port,
            environment.global_rank(),
            environment.world_size(),
            timeout_s=_PATIENCE_S,
        ):
            super().setup_environment()


def _settle(name: str, asked: int | None, found: int | None) -> int | None:
    if asked is not None and found is not None and asked != found:
        # All ranks would wait for others that are never started.
        raise ValueError(f"`{name}` must be what the launcher has, {found}; got {asked}. Leave it away.")
    return found if asked is None else asked


def shape_of_job(environ: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return processes a host, and hosts, from the launcher's environment variables; ``None`` where they are not set.

    Lightning requires both numbers, and compares them with the launcher's.

    Example:
        >>> shape_of_job({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
        (4, 2)

    """
    if "LIGHTNING_COMM_LAB" in environ:
        lab = json.loads(environ["LIGHTNING_COMM_LAB"])
        return int(lab["devices_per_host"]), int(lab["hosts"])
    if "WORLD_SIZE" in environ and "LOCAL_WORLD_SIZE" in environ:
        local = int(environ["LOCAL_WORLD_SIZE"])
        return local, int(environ["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in environ and SLURMEnvironment.detect():
        return int(environ.get("SLURM_NTASKS_PER_NODE", "1")), int(environ.get("SLURM_NNODES", "1"))
    return None, None


def _host(node: int) -> str:
    # All of a lab's hosts have the machine's name.
    return f"host {node}" if "LIGHTNING_COMM_LAB" in os.environ else socket.gethostname()


def _problem_with(out: Path) -> str | None:
    """Return why a file cannot be written, or ``None``. A file that is there is left as it is."""
    try:
        if out.is_dir():
            raise IsADirectoryError(f"It is a folder: {str(out)!r}")
        if out.exists():
            with out.open("r+b"):
                return None
        with tempfile.TemporaryFile(dir=out.parent):
            return None
    except OSError as error:
        return (
            f"lightning-comm probe: `--out` must be a file that can be written; got {str(out)!r}. {error}. Name a file "
            "in a folder that exists and is yours. Nothing was measured."
        )


def _environment(args: Sequence[str]) -> dict[str, str]:
    lab = os.environ.get("LIGHTNING_COMM_LAB")
    return {
        "command": shlex.join(["lightning-comm", "probe", *args]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "lightning": version_of("lightning"),
        "lightning-comm": version_of("lightning-comm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **({"emulated": lab} if lab else {}),
    }


def _have_nccl_log(folder: str) -> None:
    """Let NCCL write down which way it takes, unless the user has it write already."""
    if "NCCL_DEBUG" not in os.environ and "NCCL_DEBUG_FILE" not in os.environ:
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/%h.%p"}  # children inherit it


def _with_transport(profile: LinkProfile, fabric: Fabric, ledger: CommLedger) -> LinkProfile:
    """Add what carried the messages, from all ranks."""
    own = _nccl_ways() if profile.backend == "nccl" else [_gloo_interface()]
    seen: list[list[str]] = gather_json(own, device_of_group(fabric.device), ledger)
    ways = sorted({way for ways in seen for way in ways})
    return replace(profile, transport=", ".join(ways))


def _gloo_interface() -> str:
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return f"TCP on {name}"
    try:
        return f"TCP on {socket.gethostbyname(socket.gethostname())}"
    except OSError:
        return "TCP"


def _nccl_ways() -> list[str]:
    name = os.environ.get("NCCL_DEBUG_FILE", "")
    path = Path(name.replace("%h", socket.gethostname().partition(".")[0]).replace("%p", str(os.getpid())))
    return ways_taken(path.read_text(errors="replace")) if path.is_file() else []
