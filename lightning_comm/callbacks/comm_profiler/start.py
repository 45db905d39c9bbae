"""The start of a profiled run: the head of the ranks' files, their number, and the link to compare with."""

import platform
import socket
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_comm.core.costs import LinkProfile
from lightning_comm.core.ledger import CommLedger
from lightning_comm.formats.profile import next_run
from lightning_comm.instruments.clocks import json_from_rank_0


def has_several_ranks() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def next_run_number(folder: Path) -> int:
    """Return the number of the next run in a folder."""
    try:
        return next_run(folder)
    except OSError:  # a folder that cannot be read cannot be written either, and that is reported
        return 0


def header_of(trainer: Trainer, warmup_steps: int, link_bytes_per_s: float | None) -> dict[str, Any]:
    """Return the head of this rank's file: which rank measures, where and in which run."""
    return {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "host": socket.gethostname() + (f", node {trainer.node_rank}" if trainer.num_nodes > 1 else ""),
        "warmup_steps": warmup_steps,
        "started_unix_s": time.time(),
        "link_bytes_per_s": link_bytes_per_s,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "system": platform.platform(),
            "device": str(trainer.strategy.root_device),
            "backend": str(dist.get_backend_config()) if has_several_ranks() else "none",
            "strategy": type(trainer.strategy).__name__,
            "callbacks": [type(callback).__name__ for callback in getattr(trainer, "callbacks", [])],
        },
    }


def probed_bytes_per_s(path: str, trainer: Trainer, ledger: CommLedger) -> tuple[float, str]:
    """Return the bandwidth that rank 0 reads, or its problem.

    Other hosts may lack the file, so all ranks learn of it, and all refuse it alike.
    """
    bytes_per_s, problem = 0.0, ""
    if trainer.is_global_zero:
        try:
            bytes_per_s = LinkProfile.load(path).bytes_per_s
        except Exception as error:  # any error: the others wait for the result
            problem = f"got {path!r}: {error}"
    bytes_per_s, problem = json_from_rank_0((bytes_per_s, problem), trainer.strategy.root_device, ledger)
    if problem:
        problem = (
            f"`probe` must be a file that `lightning-comm probe` has saved, on rank 0; {problem}. Leave it out to "
            "measure without a comparison."
        )
    return float(bytes_per_s), problem
