"""Agreement of all ranks before training: the same loaders and settings, and the journal to replay.

Every rank makes these calls in the same order. A problem of one rank is refused by all of them alike.
"""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_comm.callbacks.adaptive_partition.checks import loader_problem, loaders_of
from lightning_comm.callbacks.adaptive_partition.memory import card_of
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.core.ledger import CommLedger
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.formats.adaptive_partition import PartitionJournal
from lightning_comm.instruments.clocks import device_of_group, gather_json, json_from_rank_0
from lightning_comm.lightning_internals import given_training_loaders

_WHERE = "AdaptivePartition"


def given_loader_problems(trainer: Trainer, ledger: CommLedger) -> list[str]:
    """Return the problems of loaders that ``fit`` was given; those that a module makes are checked later.

    Note:
        *Communication.* The problems that each rank has found, so that all refuse them alike, recorded as ``"set_up"``.

    """
    loaders = given_training_loaders(trainer)
    rows = _of_all_ranks(loader_problem(loaders) if loaders else None, trainer, ledger)
    return [f"{problem} (on rank {rank})" for rank, problem in enumerate(rows) if problem][:1]


def agreed_loaders(
    trainer: Trainer, settings: PartitionSettings, ledger: CommLedger
) -> tuple[list[PartitionedLoader], int]:
    """Return the loaders of the training data, after checking that all ranks have the same, and the same settings.

    Returns:
        The loaders, and how many ranks compute on this rank's GPU, itself included; on the CPU all of them.

    Raises:
        MisconfigurationException: On all ranks, if one has training data of another kind.
        ValueError: On all ranks, if their loaders differ in what decides about samples, or the callback's settings.

    Note:
        *Communication.* The settings of the loaders and of the callback from each rank, recorded as ``"set_up"``.

    """
    found = loaders_of(trainer)
    problem = loader_problem(found)
    own: dict[str, Any] = {
        "problem": problem,
        "loaders": [] if problem else [{**loader.settings, "steps": len(loader)} for loader in found],
        "callback": settings.shared(),
        "card": card_of(trainer.strategy.root_device),
    }
    rows = _of_all_ranks(own, trainer, ledger)
    for rank, row in enumerate(rows):
        if row["problem"]:
            raise MisconfigurationException(f"{_WHERE}: {row['problem']} (on rank {rank})")
    for rank, row in enumerate(rows):
        different = [name for name, value in row["callback"].items() if value != rows[0]["callback"][name]]
        if different:
            values = " and ".join(repr(each["callback"][different[0]]) for each in (row, rows[0]))
            raise ValueError(
                f"{_WHERE}: `{different[0]}` must be the same on all ranks, which decide by it alike; got {values} on "
                f"rank {rank} and rank 0. For a bound of each rank's own give all ranks the list of all bounds."
            )
        if row["loaders"] != rows[0]["loaders"]:
            raise ValueError(
                f"{_WHERE}: the loaders of rank {rank} and rank 0 differ: {_differences(row, rows[0])}. Every rank "
                "must have the same dataset and settings, since each takes its slice of the same order."
            )
    return found, [row["card"] for row in rows].count(own["card"])


def journal_of_rank_0(trainer: Trainer, path: str, ledger: CommLedger) -> PartitionJournal:
    """Return the journal that rank 0 reads. Other hosts may lack the file, so it is sent to all ranks.

    Raises:
        ValueError: On all ranks alike, if rank 0 cannot read it.

    Note:
        *Communication.* The journal from rank 0, recorded as ``"set_up"``.

    """
    content: dict[str, Any] = {}
    problem = ""
    if trainer.is_global_zero:
        try:
            content = PartitionJournal.load(path).to_dict()
        except Exception as error:  # any error: the others wait for the result
            problem = str(error)
    content, problem = json_from_rank_0((content, problem), trainer.strategy.root_device, ledger, "set_up")
    if problem:
        raise ValueError(
            f"{_WHERE}: `replay` must be the journal of an earlier run, on rank 0; got {path!r}. {problem}"
        )
    return PartitionJournal.from_dict(content)


def _of_all_ranks(own: Any, trainer: Trainer, ledger: CommLedger) -> list[Any]:
    if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
        return gather_json(own, device_of_group(trainer.strategy.root_device), ledger, "set_up")
    return [own]


def _differences(row: dict[str, Any], first: dict[str, Any]) -> str:
    if len(row["loaders"]) != len(first["loaders"]):
        return f"{len(row['loaders'])} loaders and {len(first['loaders'])}"
    return ", ".join(
        f"{name} is {value} and {there[name]}"
        for here, there in zip(row["loaders"], first["loaders"], strict=True)
        for name, value in here.items()
        if value != there[name]
    )
