"""Refusals and warnings of DDP with compressed gradients: argument, value, rule, way out.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it.
"""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_comm.core.arguments import is_number
from lightning_comm.strategies.common import model_checks
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.no_sync import NoSync

WHERE = "CompressedDDPStrategy"


def setting_problems(compression: Any, bucket_cap_mb: object, ddp_comm_hook: object) -> Iterator[str]:
    """Yield arguments that are out of range."""
    if ddp_comm_hook is not None:
        yield (
            "`ddp_comm_hook` cannot be used, since a bucket of gradients has one hook and `compression` takes its "
            f"place; got {ddp_comm_hook!r}. Say what to send by `compression`, such as 'bf16' or 'powersgd', or use "
            "Lightning's DDPStrategy with your hook."
        )
    try:
        compression_of(compression, WHERE)
    except ValueError as error:
        yield str(error).removeprefix(f"{WHERE}: ")
    if bucket_cap_mb is not None and not (is_number(bucket_cap_mb) and bucket_cap_mb > 0):
        yield (
            f"`bucket_cap_mb` is a size in MB, so it must be a number > 0; got {bucket_cap_mb!r}. Leave it out for "
            "torch's default."
        )


def trainer_problems(trainer: Trainer, static_graph: bool) -> Iterator[str]:
    """Yield settings of the Trainer that cannot work together with DDP's."""
    if static_graph and trainer.accumulate_grad_batches > 1:
        yield (
            f"`static_graph=True` does not go with `accumulate_grad_batches`="
            f"{trainer.accumulate_grad_batches}: torch's DDP fails in the first window, or no longer averages "
            "gradients. Leave out one of the two."
        )


def optimizer_problems(module: LightningModule, optimizers: list[Optimizer]) -> Iterator[str]:
    """Yield a problem if automatic optimization has no optimizer; for None, Lightning has one without parameters."""
    if not optimizers:
        yield model_checks.no_optimizer(module, "automatic optimization has none to step")
    yield from model_checks.trained_problems(module, optimizers)


def warn_at_start(compression: Compression, world_size: int) -> None:
    """Warn of settings that will run, but probably not as intended."""
    if isinstance(compression, NoSync):
        rank_zero_warn(
            f"{WHERE}: NoSync averages nothing, so every rank trains a model of its own. Use it to see how fast a "
            "step would be without communication, never for a model that you keep."
        )
    if world_size == 1:
        rank_zero_warn(
            f"{WHERE}: one process only, so there is nothing to send; what the compression rounds or leaves out is "
            "lost for nothing. Give the Trainer `devices=2` or more."
        )


def warn_of_non_finite(step: int, suspects: str) -> None:
    """Warn that a gradient is not finite.

    Args:
        step: Of the optimizer.
        suspects: A sentence about what may cause it, or nothing.

    """
    rank_zero_warn(
        f"{WHERE}: the gradient of optimizer step {step} is not finite (NaN or infinity), alike on all ranks. Later "
        "ones are counted in `strategy.non_finite_steps` without a word. A lower learning rate, gradient clipping or "
        f"bf16 instead of fp16 may help.{suspects}"
    )
