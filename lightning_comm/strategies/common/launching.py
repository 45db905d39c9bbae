"""Launching arguments, which each strategy of this package takes and passes on to Lightning's."""

from datetime import timedelta
from typing import Literal, TypedDict

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision

_TIMEOUT = timedelta(minutes=30)


class LaunchingArguments(TypedDict, total=False):
    """The arguments of Lightning's ``DDPStrategy`` that every strategy takes beside its own.

    Args:
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: How files are written.
        precision_plugin: Set by the Trainer.
        process_group_backend: ``"gloo"`` or ``"nccl"``; chosen by the device if left out.
        timeout: How long a rank waits for the others; 30 minutes if left out. When the job starts, ten at least.
        start_method: ``"popen"`` if left out, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    """

    accelerator: Accelerator | None
    parallel_devices: list[torch.device] | None
    cluster_environment: ClusterEnvironment | None
    checkpoint_io: CheckpointIO | None
    precision_plugin: Precision | None
    process_group_backend: str | None
    timeout: timedelta
    start_method: Literal["popen", "spawn", "fork", "forkserver"]


def launching_arguments(where: str, arguments: LaunchingArguments) -> LaunchingArguments:
    """Return the launching arguments for Lightning's strategy.

    Args:
        where: The strategy, for messages.
        arguments: What the user gave.

    Raises:
        TypeError: If there is an argument that no strategy of ours takes.

    """
    known = LaunchingArguments.__annotations__
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise TypeError(
            f"{where}: unknown argument(s) {', '.join(map(repr, unknown))}. Of Lightning's launching arguments it "
            f"takes {', '.join(f'`{name}`' for name in known)}; its own are in its docstring."
        )
    return {"timeout": _TIMEOUT, **arguments}
