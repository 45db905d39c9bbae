"""The names under which the Trainer finds our strategies."""

from typing import Any, NoReturn

from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning_utilities.core import rank_zero

from lightning_comm.contract import (
    AveragesTakenOut,
    GradientsAnnounced,
    GradientsCompressed,
    MessagesRecorded,
    SamplesWeighed,
    SynchronisesInRounds,
    TakesRefusals,
)
from lightning_comm.core.cyclic.schedule import Rule
from lightning_comm.core.local_update.periods import FixedPeriod, PeriodRule, QuadraticPeriod
from lightning_comm.strategies.compression.strategy import CompressedDDPStrategy
from lightning_comm.strategies.cyclic.strategy import CyclicStrategy
from lightning_comm.strategies.local_update.strategy import LocalUpdateStrategy
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.sparse_mask import SparseMask

# The protocols of each strategy, for callbacks and the pilot. mypy compares: a method that is renamed fails here.
REFUSED_TOGETHER: tuple[type[TakesRefusals], ...] = (LocalUpdateStrategy, CompressedDDPStrategy, CyclicStrategy)
MESSAGES_RECORDED: tuple[type[MessagesRecorded], ...] = (LocalUpdateStrategy, CompressedDDPStrategy, CyclicStrategy)
SAMPLES_WEIGHED: tuple[type[SamplesWeighed], ...] = (LocalUpdateStrategy,)
AVERAGES_TAKEN_OUT: tuple[type[AveragesTakenOut], ...] = (LocalUpdateStrategy,)
SYNCHRONISES_IN_ROUNDS: tuple[type[SynchronisesInRounds], ...] = (LocalUpdateStrategy,)
GRADIENTS_ANNOUNCED: tuple[type[GradientsAnnounced], ...] = (CompressedDDPStrategy,)
GRADIENTS_COMPRESSED: tuple[type[GradientsCompressed], ...] = (CompressedDDPStrategy,)

# Lightning lower-cases the flag before the look-up, so names are lower case.
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_LOCAL_UPDATE: dict[str, tuple[PeriodRule, dict[str, Any], str]] = {
    "local_sgd": (FixedPeriod(8), {}, "Local SGD: parameters averaged every 8 steps"),
    "post_local_sgd": (
        FixedPeriod(8),
        {"gradient_steps": 0.5},
        "post-local SGD: gradients averaged for half the run, then parameters every 8 steps",
    ),
    "qsr": (QuadraticPeriod(), {}, "QSR: parameters averaged ever more rarely as the learning rate falls"),
}
_COMPRESSED: dict[str, tuple[Compression | str, str]] = {
    "ddp_bf16": ("bf16", "DDP with gradients in bf16"),
    "ddp_fp16": ("fp16", "DDP with gradients in fp16"),
    "ddp_int8": ("int8", "DDP with gradients in 8 bits, rounded stochastically"),
    "ddp_powersgd": ("powersgd", "DDP with gradients as matrices of rank 2"),
    "ddp_topk": ("topk", "DDP with the largest 1 % of each gradient"),
    "ddp_sparse_mask": ("sparse_mask", "DDP of a pruned model, without the gradients of pruned weights"),
    "pactrain": (SparseMask(then=Cast("bf16")), "the same, with what is left in bf16"),
}
_CYCLIC: dict[str, tuple[Rule, str]] = {
    "cyclic": ("v2", "Cyclic Data Parallelism: gradients travel round a ring, parameters at most one update old"),
    "cyclic_v1": ("v1", "the same with all parameters one update old"),
}


class TwinTrainerError:
    """The error under our names in the registry of ``pytorch_lightning``, which says what to import instead."""

    def __init__(self, **_: Any) -> NoReturn:
        raise ImportError(
            "lightning_comm: its strategies work with the Trainer of `lightning.pytorch`, and this Trainer comes from "
            "`pytorch_lightning`: two packages with classes of their own. Write `from lightning.pytorch import "
            "Trainer` instead of `from pytorch_lightning import Trainer`, and likewise for modules and callbacks."
        )


def register_strategies() -> None:
    """Register every strategy with Lightning. Doing so again changes nothing."""
    names: list[str] = []
    for base, (period, arguments, description) in _LOCAL_UPDATE.items():
        names += _register(base, LocalUpdateStrategy, description, period=period, **arguments)
    for base, (compression, description) in _COMPRESSED.items():
        names += _register(base, CompressedDDPStrategy, description, compression=compression)
    for base, (rule, description) in _CYCLIC.items():
        names += _register(base, CyclicStrategy, description, rule=rule)
    _register_with_the_twin(names)


def _register(base: str, strategy: type[Strategy], description: str, **arguments: Any) -> list[str]:
    """Register a strategy once for each way of starting processes; return the names."""
    for suffix, start_method in _START_METHODS.items():
        StrategyRegistry.register(
            base + suffix,
            strategy,
            description=f"{description}; processes started by {start_method}",
            override=True,
            start_method=start_method,
            **arguments,
        )
    return [base + suffix for suffix in _START_METHODS]


def _register_with_the_twin(names: list[str]) -> None:
    """Leave a message where users of the twin package will look, if it is installed (``lightning`` brings it)."""
    log = rank_zero.log
    try:
        from pytorch_lightning.strategies import StrategyRegistry as TwinRegistry
    except ImportError:
        return
    finally:
        rank_zero.log = log  # the twin takes over the logger that both packages share
    for name in names:
        TwinRegistry.register(name, TwinTrainerError, description="needs `lightning.pytorch`", override=True)
